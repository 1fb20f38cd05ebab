"""With this folder in PYTHONPATH, every process of Python starts on the emulator: ranks that a command starts, too."""

import emulator

emulator.start()
