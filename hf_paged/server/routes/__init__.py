"""The routes, one file a family."""

from hf_paged.server.routes import chat, completions, docs, health, models, responses, tokens

ROUTERS = (completions.router, chat.router, responses.router, models.router, tokens.router, health.router, docs.router)
