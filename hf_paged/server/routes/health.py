"""Probes and versions: /health, /ready, /version."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from hf_paged._version import __version__
from hf_paged.server.lifecycle import Phase

router = APIRouter(tags=["operations"])


@router.get("/health", summary="Live: the engine makes progress, or will again")
async def health(request: Request) -> JSONResponse:
    """200 while the engine makes progress, 503 when it hangs or is lost for good: restart the server then."""
    now = request.app.state.engine.snapshot()
    return JSONResponse({"status": "ok" if now.alive else now.why}, 200 if now.alive else 503)


@router.get("/ready", summary="Ready for requests")
async def ready(request: Request) -> JSONResponse:
    """200 while requests are taken; 503 while starting, restarting or draining: send them elsewhere."""
    now, phase = request.app.state.engine.snapshot(), request.app.state.lifecycle.phase
    fine = now.ready and now.alive and phase is Phase.READY
    status = "ok" if fine else phase.value if phase is not Phase.READY else now.why
    return JSONResponse({"status": status, "replicas": list(now.replicas)}, 200 if fine else 503)


@router.get("/version", summary="The server's version")
async def version() -> dict[str, Any]:
    """hf_paged's version."""
    return {"version": __version__}
