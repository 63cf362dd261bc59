"""The routes, one file a family."""

from hf_paged.server.routes import chat, completions, health, models, tokens

ROUTERS = (completions.router, chat.router, models.router, tokens.router, health.router)
