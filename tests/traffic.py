"""An application with a plugin's routes and nothing else, and what the front would tell it."""

from __future__ import annotations

import types

from fastapi import FastAPI
from fastapi.testclient import TestClient

from hf_paged import PagedConfig
from hf_paged.server.messages import Delta, EngineStats, StepRecord
from hf_paged.server.stats import RequestRecord, ServerStats


class Traffic:
    """A server without engines: what happens is said, and the plugin hears it."""

    def __init__(self, plugin, **options):
        self.app = FastAPI()
        self.stats = self.app.state.stats = ServerStats()
        self.lifecycle = self.app.state.lifecycle = types.SimpleNamespace(on_start=[], on_stop=[])
        config = types.SimpleNamespace(names=("tiny",), paged=PagedConfig(**options))
        self.app.state.config = config
        self.hook_arguments = {"app": self.app, "config": config}
        plugin.register_routes(**self.hook_arguments)
        self.client = TestClient(self.app)

    def start(self, name, **fields):
        record = RequestRecord(
            name, f"call-{name}", **{"model": "tiny", "prompt_tokens": 10, "max_tokens": 5, **fields}
        )
        self.stats.started(record)
        return record

    def bring(self, record, tokens, **fields):
        self.stats.brought(record, Delta(record.request_id, list(range(tokens)), **fields))

    def end(self, record, reason="stop", **fields):
        times = {"queued": 0.1, "prefill": 0.2, "decode": 0.4, "preemptions": 0}
        self.stats.brought(record, Delta(record.request_id, finish=reason, **{**times, **fields}))
        self.stats.ended(record, reason)

    def report(self, **fields):
        """A replica's statistics."""
        steps = [StepRecord(*step) for step in fields.pop("steps", [])]
        base = {
            "replica": 0, "time": 0.0, "num_steps": 1, "busy": True, "running": [], "waiting": [], "kv_usage": 0.25,
            "num_blocks": 100, "num_free": 75, "block_size": 16, "prefix_queries": 0, "prefix_hits": 0,
            "preemptions": 0,
        }  # fmt: skip
        self.stats.engine(EngineStats(**{**base, **fields}, steps=steps))
