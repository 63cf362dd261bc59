"""The engine: knows nothing of transformers, HTTP or any plugin."""
