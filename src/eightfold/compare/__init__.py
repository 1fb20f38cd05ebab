"""How similar two model folders are: `compare`, and the short form that a command prints after making one of them."""

from eightfold.compare.report import Report, short_lines
from eightfold.compare.run import CompareOptions, compare, summary

__all__ = ["CompareOptions", "Report", "compare", "short_lines", "summary"]
