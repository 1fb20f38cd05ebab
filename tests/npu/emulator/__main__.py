"""`python -m emulator COMMAND …`: the eightfold command on the emulator, so that --device npu runs without an NPU."""

import sys

import emulator

emulator.start()
from eightfold.cli import main  # noqa: E402

sys.exit(main())
