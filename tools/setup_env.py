"""Build a virtual environment with this checkout installed in it, editable. Needs nothing but Python.

What was in the folder before is removed.

    python3 tools/setup_env.py .venv --extras dev
    python3 tools/setup_env.py .venv-oldest --extras test --transformers 5.17.0
    python3 tools/setup_env.py .venv-latest --extras test --transformers latest

On Linux x86-64 with Python 3.11 or newer the versions are those of constraints.txt, which are the ones tested. Where
there is no NVIDIA GPU on Linux, torch's CPU build is taken, which is a tenth of the download.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST = (3, 10)
# Another release of Transformers brings its own releases of these along.
OF_TRANSFORMERS = ("transformers", "huggingface-hub", "tokenizers", "safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to build the environment")
    parser.add_argument("--wheel", type=Path, help="install this wheel, without extras, instead of the checkout")
    parser.add_argument("--extras", default="dev", help="extras of pyproject.toml, comma separated (default: dev)")
    parser.add_argument(
        "--transformers",
        metavar="VERSION",
        help="this release of Transformers instead of the tested one; latest: the newest that the index has",
    )
    args = parser.parse_args()
    if sys.version_info < OLDEST:
        sys.exit(
            f"Python {platform.python_version()} is too old: at least {OLDEST[0]}.{OLDEST[1]} is needed (make PYTHON=…)"
        )
    python = create(args.folder)
    constraints = write_constraints(args.folder, args.transformers)
    install_torch(python)
    wanted = [str(args.wheel)] if args.wheel else ["--editable", f"{ROOT}[{args.extras}]"]
    if args.transformers:
        wanted.append("transformers" if args.transformers == "latest" else f"transformers=={args.transformers}")
    pip(python, "install", "--constraint", str(constraints), *wanted)


def create(folder: Path) -> Path:
    """An environment with pip; the path of its interpreter."""
    try:
        venv.create(folder, with_pip=True, clear=True)
    except subprocess.CalledProcessError:
        sys.exit(f"{sys.executable} can't build a virtual environment: install its venv module (Debian: python3-venv)")
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def write_constraints(folder: Path, transformers: str | None) -> Path:
    """The constraints that hold here, in the environment's folder: those tested, or none on a platform not tested."""
    tested = sys.platform == "linux" and platform.machine() == "x86_64" and sys.version_info >= (3, 11)
    lines = CONSTRAINTS.read_text().splitlines() if tested else []
    if transformers:
        lines = [line for line in lines if line.split("==")[0] not in OF_TRANSFORMERS]
    path = folder / "constraints.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def install_torch(python: Path) -> None:
    """Take torch's CPU build where there is no NVIDIA GPU on Linux; elsewhere the resolver chooses."""
    if sys.platform != "linux" or shutil.which("nvidia-smi"):
        return
    version = re.search(r"^torch==(\S+)", CONSTRAINTS.read_text(), re.MULTILINE)
    assert version is not None, f"{CONSTRAINTS} pins no torch"
    wanted = f"torch=={version[1]}+cpu"
    # First from the indexes that pip is set up with (a mirror may hold it), then from PyTorch's own.
    if pip(python, "install", "--quiet", wanted, check=False, quiet=True):
        return
    if not pip(python, "install", "--no-deps", "--index-url", CPU_INDEX, wanted, check=False):
        print(f"{wanted} is not to be had; taking the index's own build, which may bring CUDA along", flush=True)


def pip(python: Path, *arguments: str, check: bool = True, quiet: bool = False) -> bool:
    """Run pip; whether it went well. With `check`, end where it didn't."""
    output = subprocess.DEVNULL if quiet else None
    done = subprocess.run(
        [python, "-m", "pip", *arguments, "--disable-pip-version-check"], stdout=output, stderr=output
    )
    if check and done.returncode:
        sys.exit(done.returncode)
    return done.returncode == 0


if __name__ == "__main__":
    main()
