"""API keys: where they come from, and what they may look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_paged.errors import ConfigError

KEY_VARIABLE = "HF_PAGED_API_KEY"


def read_keys(given: Sequence[str], file: str | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys of a server, each once, without spaces around them.

    Args:
        given: keys by argument.
        file: a file with a key a line; lines that begin with # are comments.
        environment: asked for HF_PAGED_API_KEY, keys separated by commas, where there are none yet.

    Raises:
        ConfigError: a key is empty, the file can't be read, or a source that is given holds no key: a server without
            keys is open to everyone who reaches it.
    """
    keys = [key.strip() for key in given]
    if file is not None:
        keys += _found(_lines(file), f"--api-key-file {file!r}")
    if not keys and KEY_VARIABLE in environment:
        keys = _found(environment[KEY_VARIABLE].split(","), f"the environment variable {KEY_VARIABLE}")
    return tuple(dict.fromkeys(keys))


def _lines(file: str) -> list[str]:
    try:
        text = Path(file).read_text(encoding="utf-8-sig")  # an editor's byte order mark is no part of a key
    except OSError as error:
        raise ConfigError(f"--api-key-file {file!r} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--api-key-file {file!r} isn't UTF-8: byte {error.start} is {error.object[error.start]:#x}"
        ) from None
    return [line for line in text.splitlines() if not line.lstrip().startswith("#")]


def _found(keys: Sequence[str], source: str) -> list[str]:
    found = [key.strip() for key in keys if key.strip()]
    if not found:
        raise ConfigError(f"{source} holds no key; a server without keys is open to everyone who reaches it")
    return found
