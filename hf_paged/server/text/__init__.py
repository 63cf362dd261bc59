"""Text on both sides of the ids: tokenizer and templates, streams of text, tool calls."""
