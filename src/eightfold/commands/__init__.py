"""What the commands do, one file each: `main(args)` takes parsed options and returns the exit code.

`cli` parses without torch and imports a command's file only to run it, so these files import what they need at the
top. `options`, which `cli` imports, is the exception.
"""
