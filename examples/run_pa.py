"""Dialogue test: python examples/run_pa.py --model_path WEIGHTS …, also with -m examples.run_pa and under torchrun."""

import sys

try:
    from eightfold.compat.main import main
except ModuleNotFoundError as error:
    if error.name != "eightfold":
        raise
    sys.exit(f"eightfold: error: {sys.executable} has no Eightfold: run 'make run', then use .venv/bin/python")

if __name__ == "__main__":
    sys.exit(main(["run_pa.py", *sys.argv[1:]]))
