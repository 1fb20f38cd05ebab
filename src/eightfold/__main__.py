"""`python -m eightfold` is `eightfold`."""

import sys

from eightfold.cli import main

if __name__ == "__main__":
    sys.exit(main())
