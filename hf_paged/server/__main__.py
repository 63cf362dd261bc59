"""`python -m hf_paged.server MODEL …`: `hf-paged serve` without the other commands."""

from __future__ import annotations

import argparse
import sys

from hf_paged.errors import HFPagedError
from hf_paged.server.commands import add_serve_parser


def main() -> int:
    """Serve until a signal; the exit status."""
    parser = argparse.ArgumentParser(prog="hf-paged")
    add_serve_parser(parser.add_subparsers())
    args = parser.parse_args(["serve", *sys.argv[1:]])
    try:
        return args.run(args)
    except HFPagedError as error:
        print(f"hf-paged: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
