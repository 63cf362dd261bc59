"""Where a run's time goes: a trace of some of its steps, how busy the GPU was in them, and the host's time by part."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from hf_paged.bench import report
from hf_paged.bench.workloads import Item
from hf_paged.engine.in_flight import SampledTokens
from hf_paged.engine.thread import EngineThread
from hf_paged.ledger import Ledger
from hf_paged.llm import LLM

# A trace of all steps of a long run would fill the memory. The first are prompts alone.
FIRST, COUNT = 32, 64


def run(model: Any, items: Sequence[Item], paged: Mapping[str, Any], trace: Path) -> dict[str, Any]:
    """One more run of hf_paged, of which the steps FIRST to FIRST + COUNT are looked at.

    Returns:
        steps: how many were seen. wall_ms: milliseconds a step. gpu_busy: the share of that time in which the GPU ran
        a kernel or a copy, or None without one. host_ms: milliseconds a step by part.
    """
    with LLM(model, skip_tokenizer_init=True, **paged) as llm:
        llm.warm_up()
        with Profiled(llm.engine()[1]) as seen:
            prompts, params = [item.prompt_token_ids for item in items], [item.params for item in items]
            llm.generate(prompts, params, use_tqdm=False)
    seen.write(trace)
    return seen.summary()


def table(summary: dict[str, Any]) -> Table:
    """The table of what `run` returned."""
    busy, title = summary["gpu_busy"], f"{summary['steps']} steps of {summary['wall_ms']:.2f} ms"
    rows = [[part, f"{spent:.3f}"] for part, spent in summary["host_ms"].items()]
    title = title if busy is None else f"{title}, GPU busy {busy:.1%}"
    return report.table(title, ("part of the host's time", "ms a step"), rows)


class Profiled:
    """Looks at some steps of an engine, from within `with`."""

    def __init__(self, thread: EngineThread, first: int = FIRST, count: int = COUNT) -> None:
        self._thread = thread
        self._window = range(first, first + count)
        self._at = 0
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._steps = 0
        self._wall = 0.0
        self._began: float | None = None
        self._profiler: profile | None = None
        self._changes = Ledger()

    def __enter__(self) -> Profiled:
        engine = self._thread.engine
        for part, owner, name in (
            ("step", engine, "step"),
            ("schedule", engine.scheduler, "schedule"),
            ("build the batch", engine._builder, "build"),
            ("launch the forward", engine.runner, "forward"),
            ("launch the sampling", engine._sampler, "launch"),
            ("wait for the device", SampledTokens, "wait"),
            ("land", engine, "_land"),
        ):
            self._changes.set_attribute(owner, name, self._timed(part, getattr(owner, name)))
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.do(self._stop)  # torch's profiler is stopped by the thread that began it
        self._changes.undo()

    def write(self, trace: Path) -> None:
        """Write what was seen in Chrome's trace format; nothing, if the run was over before."""
        if self._profiler is not None:
            self._profiler.export_chrome_trace(str(trace))

    def summary(self) -> dict[str, Any]:
        """What `run` returns."""
        spent = dict(self._spent)
        spent["land"] = spent.get("land", 0.0) - spent.get("wait for the device", 0.0)
        step = spent.pop("step", 0.0)
        spent["the rest of the step"] = step - sum(spent.values())
        spent["between steps"] = self._wall - step
        each = {part: round(1000 * value / max(1, self._steps), 4) for part, value in spent.items()}
        busy = None if self._profiler is None else _busy(self._profiler)
        return {
            "steps": self._steps,
            "wall_ms": round(1000 * self._wall / max(1, self._steps), 4),
            "gpu_busy": busy and round(busy, 4),
            "host_ms": each,
        }

    def _turn(self) -> None:
        """A step begins."""
        if self._at == self._window.start:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profiler = profile(activities=activities)
            self._profiler.start()
            self._began = time.perf_counter()
        if self._at == self._window.stop:
            self._stop()
        self._at += 1
        self._steps += self._began is not None

    def _stop(self) -> None:
        if self._began is not None and self._profiler is not None:
            self._wall, self._began = time.perf_counter() - self._began, None
            self._profiler.stop()

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if part == "step":
                self._turn()
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                if self._began is not None:
                    self._spent[part] += time.perf_counter() - began

        return timed


def _busy(profiler: profile) -> float | None:
    """The share of the time between the first and the last of the GPU's work in which there was some."""
    found = [e.time_range for e in profiler.events() or () if e.device_type.name == "CUDA"]
    if not found:
        return None
    found.sort(key=lambda span: span.start)
    busy, end = 0.0, found[0].start
    for span in found:
        busy += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return busy / (end - found[0].start)
