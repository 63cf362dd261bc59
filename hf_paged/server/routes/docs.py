"""/docs: the API in a browser. Page, scripts and style come from this server; no other host is asked for anything."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response

from hf_paged.server.errors import APIError

router = APIRouter(include_in_schema=False)

_OWN, _SWAGGER = resources.files("hf_paged.server.routes"), resources.files("fastapi_swagger.resources")
FILES = {
    "docs.js": (_OWN, "text/javascript"),
    "swagger-ui-bundle.js": (_SWAGGER, "text/javascript"),
    "swagger-ui.css": (_SWAGGER, "text/css"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@router.get("/docs")
def docs() -> Response:
    """The page. The addresses in it are relative to its own, so that they hold below a root path."""
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache", "Referrer-Policy": "no-referrer"}
    return HTMLResponse((_OWN / "docs.html").read_text(encoding="utf-8"), headers=headers)


@router.get("/docs/{name}")
def file(name: str) -> Response:
    """A script or style of the page."""
    if name not in FILES:
        raise APIError(404, f"there is no file {name!r}; there are {', '.join(FILES)}")
    folder, kind = FILES[name]
    headers = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
    return Response((folder / name).read_bytes(), media_type=kind, headers=headers)
