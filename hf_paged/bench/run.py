"""What one timed run of an engine gave."""

from __future__ import annotations

import dataclasses

from hf_paged.bench.kv import KVUse


@dataclasses.dataclass(frozen=True)
class Run:
    """One run over a workload.

    Attributes:
        seconds: wall time, from the first request handed in to the last token back.
        outputs: the new tokens of each request, in the order of the requests; only useful ones.
        kv: the KV memory it took.
    """

    seconds: float
    outputs: list[list[int]]
    kv: KVUse

    @property
    def tokens(self) -> int:
        """Useful tokens generated."""
        return sum(len(output) for output in self.outputs)

    @property
    def tokens_per_second(self) -> float:
        """Useful tokens a second."""
        return self.tokens / self.seconds
