"""`eightfold bench compare`: see `eightfold.bench.comparison`."""

from eightfold.bench.comparison import main as main
