"""`eightfold bench requests`: see `eightfold.bench.requests.cli`."""

from __future__ import annotations

import argparse

from eightfold.bench.requests import cli
from eightfold.commands import console
from eightfold.commands.options import engine_options


def main(args: argparse.Namespace) -> int:
    console.show_warnings(args)
    return cli.run(args, engine_options(args))
