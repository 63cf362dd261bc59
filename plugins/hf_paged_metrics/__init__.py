"""Prometheus metrics of the server at /metrics, under the names and with the meanings of vLLM's, prefixed `hf_paged:`.

Where the environment variable PROMETHEUS_MULTIPROC_DIR names a directory, all processes that share it are counted
together, as prometheus-client has it; the directory has to be empty when the server starts.

prometheus-client is an optional library, and part of the extra `server`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from hf_paged import hookimpl


@hookimpl
def register_routes(app: Any, config: Any) -> None:
    """Add /metrics, and listen to what the server does."""
    if find_spec("prometheus_client") is None:
        app.add_api_route("/metrics", _missing, methods=["GET"], include_in_schema=False)
        return
    from hf_paged_metrics.route import add_metrics

    add_metrics(app, config)


def _missing() -> None:
    from fastapi import HTTPException

    message = "metrics need prometheus-client, which isn't installed: pip install '.[server]' in a clone of hf_paged"
    raise HTTPException(501, message)
