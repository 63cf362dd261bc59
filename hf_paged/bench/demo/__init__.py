"""The demo: stock `generate()` against the patched one, on the same prompts, side by side."""
