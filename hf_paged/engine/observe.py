"""What step observers are told."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hf_paged.engine.in_flight import InFlightStep
from hf_paged.engine.tables import BlockTables
from hf_paged.protocols import StepObserver
from hf_paged.stats import StepStats


class Observers:
    """Tells step observers of each step that landed."""

    def __init__(self, observers: Sequence[StepObserver], tables: BlockTables) -> None:
        self._observers = list(observers)
        self._tables = tables
        self._landed = 0.0  # when the last step landed, in seconds of `time.monotonic()`

    def tell(self, landing: InFlightStep) -> None:
        """Tell them of a step whose requests have their tokens."""
        if not self._observers:
            return
        step, tables, landed = landing.step, self._tables, time.monotonic()
        decode = sum(row.count == 1 and row.start >= len(row.request.prompt_token_ids) for row in step.rows)
        stats = StepStats(
            num_running=landing.queues[0],
            num_waiting=landing.queues[1],
            num_prefill_tokens=step.num_tokens - decode,
            num_decode_tokens=decode,
            num_preempted=len(step.preempted),
            kv_usage=tables.usage,
            prefix_queries=tables.prefix_queries,
            prefix_hits=tables.prefix_hits,
            duration=landed - max(landing.began, self._landed),
        )
        self._landed = landed
        for observer in self._observers:
            observer(stats)
