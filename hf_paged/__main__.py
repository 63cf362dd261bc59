"""`python -m hf_paged [OPTIONS] SCRIPT ARGS…`, or `-m MODULE ARGS…`: run a program with every model patched."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from typing import Any

from hf_paged import plugins
from hf_paged.arguments import paged_options
from hf_paged.config import PagedConfig
from hf_paged.errors import HFPagedError
from hf_paged.hf.patch import patch

USAGE = """usage: python -m hf_paged [--option NAME=VALUE …] SCRIPT [ARGS …]
       python -m hf_paged [--option NAME=VALUE …] -m MODULE [ARGS …]

Run a program unchanged, with generate() of every Transformers model paged and batched continuously.

  --option NAME=VALUE   an option of hf_paged.PagedConfig, such as keep_pool=true; may be given several times

Other commands: hf-paged --help"""
OPTION = "--option"
HELP = ("-h", "--help")


def main(argv: Sequence[str]) -> int:
    """Run a script or module as Python itself would; the exit status is the program's own."""
    if not argv:
        print(USAGE, file=sys.stderr)
        return 2
    pairs, program = _split(argv)
    if program and program[0] in HELP:
        print(USAGE)
        return 0
    try:
        options = _checked(pairs)
    except HFPagedError as error:
        return _fail(str(error))
    if not program:
        return _fail("there is no script to run")
    return _run_module(program[1:], options) if program[0] == "-m" else _run_script(program, options)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The values of the options before the program, and the program with its own arguments."""
    pairs, rest = [], list(argv)
    while rest and (rest[0] == OPTION or rest[0].startswith(f"{OPTION}=")):
        _, separator, pair = rest.pop(0).partition("=")
        pairs.append(pair if separator else rest.pop(0) if rest else "")
    return pairs, rest


def _checked(pairs: Sequence[str]) -> dict[str, Any]:
    """The options that NAME=VALUE texts give, found valid before the program starts."""
    options = paged_options(pairs)
    if options:  # names of backends and schedulers are known to the plugins alone
        config = PagedConfig(**options)
        plugins.registry(plugins.load(config), config)
    return options


def _run_module(program: Sequence[str], options: dict[str, Any]) -> int:
    if not program:
        return _fail("-m needs the name of a module")
    patch(**options)
    # runpy alone suffices: sys.path[0] is the working directory already, as under `python -m`.
    sys.argv = list(program)
    runpy.run_module(program[0], run_name="__main__", alter_sys=True)
    return 0


def _run_script(program: Sequence[str], options: dict[str, Any]) -> int:
    script = program[0]
    if script.startswith("-"):
        return _fail(f"unknown option {script!r}")
    if not os.path.exists(script):
        return _fail(f"there is no script {script!r} in {os.getcwd()!r}")
    patch(**options)
    sys.argv = list(program)
    if os.path.isfile(script):
        sys.path[0] = os.path.dirname(os.path.abspath(script))  # as `python SCRIPT` has it; run_path sets no such thing
    runpy.run_path(os.path.abspath(script), run_name="__main__")
    return 0


def _fail(message: str) -> int:
    print(f"python -m hf_paged: error: {message}\n\n{USAGE}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
