"""Float weights → W8A8: python convert_quant_weights.py --model_path FLOAT --save_directory W8A8."""

import sys

try:
    from eightfold.compat.main import main
except ModuleNotFoundError as error:
    if error.name != "eightfold":
        raise
    sys.exit(f"eightfold: error: {sys.executable} has no Eightfold: run 'make run', then use .venv/bin/python")

if __name__ == "__main__":
    sys.exit(main(["convert_quant_weights.py", *sys.argv[1:]]))
