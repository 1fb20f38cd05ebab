"""`python -m eightfold.compat COMMAND WORD…`, which the scripts call."""

import sys

from eightfold.compat.main import main

sys.exit(main(sys.argv[1:]))
