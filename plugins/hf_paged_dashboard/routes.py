"""The page, and what it reads."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from fastapi import Response
from fastapi.responses import HTMLResponse, JSONResponse

from hf_paged_dashboard.state import State

PAGE = Path(__file__).with_name("page.html")


def add_dashboard(app: Any, config: Any) -> None:
    """Serve the page at `/`, and the state that it shows at `/dashboard/state`."""
    state = State(app.state.stats, app.state.lifecycle, config.names[0])
    html = PAGE.read_text(encoding="utf-8")
    headers = {"Content-Security-Policy": policy(html), "Cache-Control": "no-cache", "Referrer-Policy": "no-referrer"}

    async def page() -> Response:
        return HTMLResponse(html, headers=headers)

    async def snapshot() -> Response:  # in the event loop, where the state changes
        return JSONResponse(state.snapshot(), headers={"Cache-Control": "no-store"})

    app.add_api_route("/", page, methods=["GET"], include_in_schema=False)
    app.add_api_route("/dashboard/state", snapshot, methods=["GET"], include_in_schema=False)


def policy(html: str) -> str:
    """A content security policy: the page runs its own script and style, talks to its own server, and no more."""
    script, style = (_digest(html, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _digest(html: str, tag: str) -> str:
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
