"""`python -m hf_paged SCRIPT ARGS…`, `python -m hf_paged -m MODULE ARGS…`: run a program with every model patched."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence

USAGE = """usage: python -m hf_paged SCRIPT [ARGS …]
       python -m hf_paged -m MODULE [ARGS …]

Run a program unchanged, with generate() of every Transformers model paged and batched continuously.
Other commands: hf-paged --help"""


def main(argv: Sequence[str]) -> int:
    """Run a script or module as Python itself would; the exit status is the program's own."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "-m":
        if len(argv) < 2:
            return _fail("-m needs the name of a module")
        _patch()
        # What stands in the way of Python's own `-m`: sys.path[0] is the working directory already.
        sys.argv = list(argv[1:])
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        return 0
    script = argv[0]
    if script.startswith("-"):
        return _fail(f"unknown option {script!r}")
    if not os.path.exists(script):
        return _fail(f"there is no script {script!r} in {os.getcwd()!r}")
    _patch()
    sys.argv = list(argv)
    if os.path.isfile(script):
        sys.path[0] = os.path.dirname(os.path.abspath(script))  # as `python SCRIPT` has it; run_path sets no such thing
    runpy.run_path(os.path.abspath(script), run_name="__main__")
    return 0


def _patch() -> None:
    import hf_paged

    hf_paged.patch()


def _fail(message: str) -> int:
    print(f"python -m hf_paged: error: {message}\n\n{USAGE}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
