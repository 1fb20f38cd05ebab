"""`eightfold bench`: see `eightfold.bench.cli`."""

from eightfold.bench.cli import main as main
