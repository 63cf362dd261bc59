"""Chat templates: a conversation -> the prompt's text."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from hf_paged.errors import ConfigError, InvalidRequestError
from hf_paged.text.messages import for_template

RESERVED = ("messages", "tools", "documents", "chat_template", "tokenize", "return_tensors", "return_dict", "padding",
            "truncation", "max_length", "conversation", "add_generation_prompt", "continue_final_message",
            "self", "tokenizer_kwargs", "return_assistant_tokens_mask", "processor_kwargs")  # fmt: skip
CONTENT_FORMATS = ("auto", "string", "openai")
_PROBE = "a text to look for"
# Whether a template takes parts, by tokenizer and template; None stands for a tokenizer's several templates.
_known: weakref.WeakKeyDictionary[Any, dict[str | None, bool]] = weakref.WeakKeyDictionary()


def render(
    tokenizer: Any,
    messages: Sequence[Any],
    *,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    chat_template: str | None = None,
    content_format: str = "auto",
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    options: Mapping[str, Any] | None = None,
) -> str:
    """What the chat template makes of a conversation. It writes special tokens itself.

    Args:
        tokenizer: a Transformers tokenizer.
        messages: as OpenAI has them; see `messages.for_template`.
        tools, documents, add_generation_prompt, continue_final_message: as for `apply_chat_template`.
        chat_template: instead of the tokenizer's own.
        content_format: how the template takes a message's content: "string", "openai" (a list of parts), or "auto":
            found out.
        options: further variables of the template.

    Raises:
        ConfigError: there is no template, or an option has the name of an argument.
        InvalidRequestError: a message is none, or the template refuses the conversation.
    """
    if chat_template is None and not tokenizer.chat_template:
        raise ConfigError("the tokenizer has no chat template; give chat_template=...")
    if taken := sorted(set(options or {}) & set(RESERVED)):
        raise ConfigError(f"chat_template_kwargs can't set {taken[0]!r}; that is an argument of its own")
    if content_format not in CONTENT_FORMATS:
        raise ConfigError(f"the content format must be one of {', '.join(CONTENT_FORMATS)}, got {content_format!r}")
    parts = content_format == "openai" or (content_format == "auto" and _takes_parts(tokenizer, chat_template))
    prepared = [for_template(message, parts=parts) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            prepared,
            tools=list(tools) if tools else None,
            documents=list(documents) if documents else None,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **(options or {}),
        )
    except Exception as error:  # a template may end with any error
        raise InvalidRequestError(f"the chat template refuses these messages: {error}") from error
    return str(text)


def _takes_parts(tokenizer: Any, chat_template: str | None) -> bool:
    """Whether the template loses a text that is no list of parts, as those of vision-language models do."""
    own = tokenizer.chat_template
    key = chat_template or (own if isinstance(own, str) else None)
    known = _known.setdefault(tokenizer, {})
    if key not in known:
        plain, parted = (
            {"role": "user", "content": content} for content in (_PROBE, [{"type": "text", "text": _PROBE}])
        )
        known[key] = not _shows(tokenizer, chat_template, plain) and _shows(tokenizer, chat_template, parted)
    return known[key]


def _shows(tokenizer: Any, chat_template: str | None, message: Mapping[str, Any]) -> bool:
    try:
        text = tokenizer.apply_chat_template([message], chat_template=chat_template, tokenize=False)
    except Exception:
        return False
    return _PROBE in text
