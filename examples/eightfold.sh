#!/usr/bin/env bash
# Runs one of MindIE-LLM's commands on Eightfold: eightfold.sh COMMAND WORD…; all else is in src/eightfold/compat.
# The Python is $PYTHON, or that of the active virtual environment, or this checkout's own .venv, or python3.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
python=${PYTHON:-${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/python}}
[ -n "$python" ] || { [ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python; } || python=python3
if ! "$python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("eightfold") is None)'; then
    echo "eightfold: error: $python has no Eightfold: run 'make run' in $root, or name a Python that has it by PYTHON" >&2
    exit 2
fi
exec "$python" -m eightfold.compat "$@"
