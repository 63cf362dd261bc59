"""A page at `/` that shows what the engine does right now: requests, KV blocks, speed, waiting times; and a box to try.

It is one file, which fetches nothing but `/dashboard/state` and, from the box, the server's own API.
"""

from __future__ import annotations

from typing import Any

from hf_paged import hookimpl


@hookimpl
def register_routes(app: Any, config: Any) -> None:
    """Add the page and what it reads."""
    from hf_paged_dashboard.routes import add_dashboard

    add_dashboard(app, config)
