"""OpenTelemetry traces of the server: one span a request, with the spans queue, prefill and decode inside.

Off unless the environment variable HF_PAGED_TRACES is set: `otlp` sends spans as OpenTelemetry's own variables say
(OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, …), `console` prints them on stderr.

OpenTelemetry is an optional library: `pip install '.[otel]'` in a clone of hf_paged.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from hf_paged import ConfigError, hookimpl

VARIABLE = "HF_PAGED_TRACES"
KINDS = ("otlp", "console")


@hookimpl
def register_routes(app: Any, config: Any) -> None:
    """Listen to what the server does, if traces are asked for. There are no routes."""
    kind = os.environ.get(VARIABLE, "")
    if not kind:
        return
    if kind not in KINDS:
        raise ConfigError(f"{VARIABLE} must be one of {', '.join(KINDS)}, got {kind!r}")
    if not _installed():
        raise ConfigError(f"{VARIABLE}={kind} needs OpenTelemetry: pip install '.[otel]' in a clone of hf_paged")
    from hf_paged_otel.export import provider
    from hf_paged_otel.spans import Listener

    made = provider(kind)
    app.state.stats.subscribe(Listener(made.get_tracer("hf_paged")))
    app.state.lifecycle.on_stop.append(made.shutdown)  # sends what is left


def _installed() -> bool:
    try:
        return find_spec("opentelemetry.sdk") is not None and find_spec("opentelemetry.exporter.otlp") is not None
    except ModuleNotFoundError:  # of the parent package
        return False
