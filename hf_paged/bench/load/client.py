"""One streamed completion, timed as its client sees it."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import aiohttp

_EMPTY = re.compile(rb'"choices":\s*\[\]')
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')


@dataclasses.dataclass
class Timed:
    """What became of one request. Points in time are `time.perf_counter()`.

    Attributes:
        start: when it was due; a client that is late makes it slower, not earlier.
        sent: when it was sent.
        prompt_tokens: of its prompt.
        first, last: when the first and the last text came; None: none came.
        gaps: seconds between two texts, one for each but the first; texts that came together have 0 between them.
        output_tokens: by the server's own count, or else the number of texts.
        end: when the answer ended.
        error: what went wrong, or None.
    """

    start: float
    prompt_tokens: int
    sent: float = 0.0
    first: float | None = None
    last: float | None = None
    gaps: array[float] = dataclasses.field(default_factory=lambda: array("d"))
    output_tokens: int = 0
    end: float = 0.0
    error: str | None = None

    @property
    def ttft(self) -> float:
        """Seconds to the first text."""
        return (self.first if self.first is not None else self.end) - self.start

    @property
    def per_token(self) -> float | None:
        """Seconds a token after the first, on average, or None where there was only one."""
        if self.first is None or self.last is None or self.output_tokens < 2:
            return None
        return (self.last - self.first) / (self.output_tokens - 1)

    @property
    def latency(self) -> float:
        """Seconds to the end."""
        return self.end - self.start


async def complete(session: aiohttp.ClientSession, url: str, body: bytes, timed: Timed) -> None:
    """Send a request and read its stream to the end. What goes wrong is noted, not raised."""
    import aiohttp

    timed.sent = time.perf_counter()
    try:
        async with session.post(url, data=body) as response:
            if response.status != 200:
                timed.error = f"HTTP {response.status}: {(await response.text())[:200]}"
            else:
                await _read(response.content, timed)
    except TimeoutError:
        timed.error = "timeout"
    except (aiohttp.ClientError, OSError) as error:
        timed.error = f"{type(error).__name__}: {error}"[:200]
    timed.end = time.perf_counter()


async def _read(stream: aiohttp.StreamReader, timed: Timed) -> None:
    """Note when texts come. A piece of the stream is looked at once, and nothing is parsed while tokens flow."""
    rest, last_lines = b"", b""
    while piece := await stream.readany():
        now = time.perf_counter()
        *lines, rest = (rest + piece).split(b"\n")
        events = [line for line in lines if line.startswith(b"data:")]
        for line in events:
            if line.startswith((b"data: [DONE]", b"data:[DONE]")):
                last_lines = b"done"
            elif _is_error(line):
                timed.error = line[5:].strip().decode(errors="replace")[:200]
            elif b'"usage"' in line and (found := _USAGE.search(line)):
                timed.output_tokens = int(found[1])
                if not _EMPTY.search(line):
                    _note(timed, now)
            else:
                _note(timed, now)
    if timed.error is None and not last_lines:
        timed.error = "the stream ended without [DONE]"
    timed.output_tokens = timed.output_tokens or len(timed.gaps) + (timed.first is not None)


def _note(timed: Timed, now: float) -> None:
    if timed.last is None:
        timed.first = now
    else:
        timed.gaps.append(now - timed.last)
    timed.last = now


def _is_error(line: bytes) -> bool:
    if not line.startswith((b'data: {"error"', b'data:{"error"')):
        return False
    try:
        return bool(json.loads(line[5:]).get("error"))
    except ValueError:
        return True
