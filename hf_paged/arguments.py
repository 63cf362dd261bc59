"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable, Sequence
from typing import Any

from hf_paged.config import PagedConfig
from hf_paged.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--device and --dtype."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: the first GPU, or else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: the checkpoint's)")


def add_options(parser: argparse.ArgumentParser) -> None:
    """--option NAME=VALUE, for everything in PagedConfig."""
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of hf_paged.PagedConfig, such as block_size=32; may be given several times",
    )


def paged_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Options of PagedConfig from NAME=VALUE arguments, found valid.

    Raises:
        ConfigError: an option is unknown, or its value is out of range.
    """
    options = parse_options(pairs)
    PagedConfig().replace(**options)
    return options


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE arguments as a dict; a value that is a Python literal becomes it, or true, false and none in any case.

    Any other stays text.

    Raises:
        ConfigError: an argument has no '='.
    """
    options = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise ConfigError(f"an option is given as NAME=VALUE, got {pair!r}")
        try:
            options[name] = ast.literal_eval(value.title() if value.lower() in ("true", "false", "none") else value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def at_least_one(text: str) -> int:
    """An argument that counts something."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def number(says: str, fits: Callable[[float], bool]) -> Callable[[str], float]:
    """An argument that is a number; `says` which ones fit."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not fits(value):
            raise argparse.ArgumentTypeError(f"must be {says}, got {text!r}")
        return value

    return parse
