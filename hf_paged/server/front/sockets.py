"""Where the sockets between the front and its engines lie: a private folder, looked after."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import zmq
import zmq.asyncio

logger = logging.getLogger("hf_paged.server")

SCHEME = "ipc://"
PREFIX = "hf_paged-"
LOCK = "lock"  # held for as long as the folder's server lives
NAME_LENGTH = 32  # characters that the folder and a socket add to a path, at most
FALLBACKS = ("/tmp", "/dev/shm", "/var/tmp")  # where the temporary folder can't be used


class Sockets:
    """A folder of our own for sockets, and zmq's context.

    Only this user can open the folder: who reaches a socket could send anything to an engine. It is made with the first
    address, and again where something has removed it: sockets that are connected stay so without their files.
    """

    def __init__(self) -> None:
        self.context = zmq.asyncio.Context()
        self.plain: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(self.context.underlying)
        self._folder: Path | None = None
        self._lock: TextIO | None = None
        self._numbers = itertools.count()

    def address(self) -> str:
        """One that was not used before.

        Raises:
            OSError: no folder can be made.
        """
        if self._folder is None or not self._folder.is_dir():
            self._forget_folder()
            folder = _new_folder()
            self._lock = _locked(folder)
            self._folder = folder  # only with its lock: `sweep` removes folders without one
        return f"{SCHEME}{self._folder}/{next(self._numbers)}"

    def discard(self, address: str) -> None:
        """Remove the file of a socket, which a process that was killed leaves behind."""
        with contextlib.suppress(OSError):
            os.unlink(address.removeprefix(SCHEME))

    def _forget_folder(self) -> None:
        if self._lock is not None:
            self._lock.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = self._lock = None

    def close(self) -> None:
        """Remove everything."""
        self.context.destroy(linger=0)
        self._forget_folder()


def sweep() -> None:
    """Remove the folders of this user's servers that are dead: their locks are free."""
    for base in _bases():
        for folder in base.glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):
                if folder.stat().st_uid == os.getuid():
                    _locked(folder, create=False).close()
                    shutil.rmtree(folder)


def _new_folder() -> Path:
    """A new folder that this user alone can open, under a path that is short enough for a socket's name."""
    failure: OSError | None = None
    for base in _bases():
        try:
            return Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        except OSError as error:
            failure = failure or error
    raise failure or FileNotFoundError(f"no folder for temporary files; tried {', '.join(FALLBACKS)}")


def _bases() -> Iterator[Path]:
    with contextlib.suppress(OSError):
        first = tempfile.gettempdir()
        for base in dict.fromkeys((first, *FALLBACKS)):
            if len(os.fsencode(base)) + NAME_LENGTH <= zmq.IPC_PATH_MAX_LEN and os.path.isdir(base):
                yield Path(base)
            elif base == first:
                logger.warning("the path of the temporary folder %.200r is too long for sockets; trying others", base)


def _locked(folder: Path, *, create: bool = True) -> TextIO:
    """The folder's lock, held.

    Raises:
        OSError: another process holds it, or (`create=False`) there is none.
    """
    lock = open(folder / LOCK, "w" if create else "r+")  # noqa: SIM115 (held for the folder's life)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        lock.close()
        raise
    return lock
