"""How every benchmark ends: one line of JSON, last on stdout, and in a file where that is asked for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def add_option(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON there too")


def write(summary: Mapping[str, Any], path: Path | None) -> None:
    """Print the summary, and write it to `path`."""
    line = json.dumps(summary)
    if path is not None:
        path.write_text(line + "\n")
    print(line)
