"""The routes, one file a family."""

from hf_paged.server.routes import health

ROUTERS = (health.router,)
