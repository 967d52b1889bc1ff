"""``python -m bench``: fastopt's optimizers against others and against what the memory allows."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

#: By command, the module that has HELP, add_arguments(parser) and main(options) -> exit status.
COMMANDS = {
    "list": "listing",
    "run": "run",
    "compare": "compare",
    "tables": "tables",
    "plot": "plots",
    "report": "page",
    "plan": "scale",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command, module_name in COMMANDS.items():
        module = importlib.import_module(f"bench.{module_name}")
        added = commands.add_parser(command, help=module.HELP, description=module.__doc__)
        module.add_arguments(added)
        added.set_defaults(main=module.main)
    options = parser.parse_args(arguments)
    status: int = options.main(options)
    return status


if __name__ == "__main__":
    sys.exit(main())
