"""Text on both sides of the ids, the same for `LLM` and the server.

    prompts.py        what LLM.generate takes -> ids
    messages.py       a conversation, as chat templates want it
    templates.py      the conversation -> the prompt's text
    detokenizer.py    ids -> text, piece by piece
    output.py         the text of an output, cut at its first stop string
    defaults.py       sampling and ends as the generation config has them
    bad_words.py      texts -> the ids that must not be produced
    tokens.py         the text and the bytes of single tokens, for log-probabilities

Tokenizers are Transformers' (or have their methods), but nothing of Transformers is imported.
"""
