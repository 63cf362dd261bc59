"""The route /metrics."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from fastapi import Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector

from hf_paged_metrics.listener import Listener
from hf_paged_metrics.metrics import Metrics

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"


def add_metrics(app: Any, config: Any) -> None:
    """Count what the server of this process does, and serve the counts."""
    registry = CollectorRegistry()
    app.state.stats.subscribe(Listener(Metrics(registry), config.names[0], config.paged.enable_prefix_caching))

    def metrics(request: Request) -> Response:
        """Metrics in Prometheus' text format, or OpenMetrics where it is asked for."""
        encode, content_type = _encoder(request.headers.get("accept", ""))
        return Response(encode(_collected(registry)), headers={"Content-Type": content_type})

    app.add_api_route("/metrics", metrics, methods=["GET"], response_class=PlainTextResponse, tags=["operations"])


def _encoder(accept: str) -> tuple[Callable[[CollectorRegistry], bytes], str]:
    """The encoder that an Accept header asks for; the plain text format's, where the header can't be read."""
    try:
        return choose_encoder(accept)
    except Exception:  # whatever prometheus_client raises for versions and weights that are no numbers
        return choose_encoder("")


def _collected(own: CollectorRegistry) -> CollectorRegistry:
    """What is to be served: this process' metrics, or those of all processes that share a directory."""
    if DIRECTORY not in os.environ:
        return own
    shared = CollectorRegistry()
    MultiProcessCollector(shared)
    return shared
