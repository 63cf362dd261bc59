"""Text on both sides of the ids, the same for `LLM` and the server.

    prompts.py        what LLM.generate takes -> ids
    messages.py       a conversation, as chat templates want it
    templates.py      the conversation -> the prompt's text
    detokenizer.py    ids -> text, piece by piece
    stops.py          stop strings in it, and ids that end an output
    bad_words.py      texts -> the ids that must not be produced
    tokens.py         the text and the bytes of single tokens, for log-probabilities

Tokenizers are Transformers' (or have their methods), but nothing of Transformers is imported.
"""
