"""ModelText: the tokenizer and its chat template, used in threads so that the event loop goes on."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import TemplateError

from hf_paged.errors import ConfigError
from hf_paged.hf.detokenize import banned_ids
from hf_paged.hf.load import load_tokenizer
from hf_paged.server.config import ServerConfig
from hf_paged.server.errors import APIError, invalid

T = TypeVar("T")

THREADS = 4
PIECE = 50_000  # characters that are tokenised at a time to see whether a text is too long
SEAM = 8  # tokens that cutting a text may add at a seam
RESERVED = ("messages", "tools", "documents", "chat_template", "tokenize", "return_tensors", "return_dict", "padding",
            "truncation", "max_length", "conversation", "add_generation_prompt", "continue_final_message")  # fmt: skip


class ModelText:
    """Text to ids and back, for one model.

    Args:
        tokenizer: the model's.
        chat_template: instead of the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        own = tokenizer.chat_template
        self.chat_template = chat_template or (own if isinstance(own, str) else None)
        self._several = isinstance(own, dict)  # the tokenizer chooses by whether there are tools
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="text")

    @classmethod
    def load(cls, config: ServerConfig) -> ModelText:
        """The tokenizer and template that the options name.

        Raises:
            ConfigError: one of them can't be loaded.
        """
        name = config.tokenizer or config.model
        try:
            tokenizer = load_tokenizer(name, revision=config.revision, trust_remote_code=config.trust_remote_code)
        except (OSError, ValueError) as error:
            raise ConfigError(f"the tokenizer of {name!r} can't be loaded: {error}") from error
        return cls(tokenizer, _template(config.chat_template))

    @property
    def eos(self) -> frozenset[int]:
        """The tokenizer's id for the end of a sequence; the model may know more."""
        return frozenset(i for i in [self.tokenizer.eos_token_id] if i is not None)

    async def run(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """Call a function in a thread."""
        call = functools.partial(function, *arguments, **options)
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    # -------------------------------------------------------------------------------------------------- text to ids

    async def encode(self, text: str, *, special: bool, most: int | None, param: str) -> list[int]:
        """The ids of a text.

        Args:
            special: add the special tokens that the tokenizer adds.
            most: ids that may come of it; a text that is far too long is refused before all of it is tokenised.
            param: the field that the text is from.

        Raises:
            APIError: 400, it is too long.
        """
        return await self.run(self._encode, text, special, most, param)

    def _encode(self, text: str, special: bool, most: int | None, param: str) -> list[int]:
        if most is not None and len(text) > max(PIECE, most):
            seen = 0
            for number, start in enumerate(range(0, len(text), PIECE)):
                seen += len(self.tokenizer.encode(text[start : start + PIECE], add_special_tokens=False))
                if seen > most + SEAM * (number + 1):
                    raise too_long(f"more than {seen - SEAM * (number + 1)}", most, param)
        return list(self.tokenizer.encode(text, add_special_tokens=special))

    async def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of short texts, without special tokens."""
        return await self.run(lambda: [self.tokenizer.encode(text, add_special_tokens=False) for text in texts])

    async def banned(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The token sequences of bad words."""
        return await self.run(banned_ids, self.tokenizer, words)

    async def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of ids."""
        return await self.run(self.tokenizer.decode, list(ids), skip_special_tokens=skip_special)

    def token(self, token: int) -> str:
        """The text of one id."""
        return self.tokenizer.decode([token])

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_options: Mapping[str, Any] | None = None,
    ) -> str:
        """What the chat template makes of a conversation.

        Raises:
            APIError: 400, there is no template, or it refuses the conversation.
        """
        template = chat_template or self.chat_template
        if not template and not self._several:
            raise invalid(
                "the model has no chat template; start the server with --chat-template, or use /v1/completions"
            )
        options = dict(template_options or {})
        if taken := sorted(set(options) & set(RESERVED)):
            raise invalid(f"chat_template_kwargs can't set {taken[0]!r}", "chat_template_kwargs")
        call = functools.partial(
            self.tokenizer.apply_chat_template,
            list(messages),
            tools=list(tools) if tools else None,
            documents=list(documents) if documents else None,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **options,
        )
        try:
            return await self.run(call)
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise invalid(f"the chat template refuses these messages: {error}", "messages") from error


def too_long(count: int | str, most: int, param: str, output: int = 0) -> APIError:
    """The 400 for a prompt that doesn't fit."""
    wanted = f" and {output} in the completion" if output else ""
    return invalid(
        f"This model's maximum context length is {most} tokens, but the request has {count} in the {param}{wanted}; "
        "shorten one of them",
        param,
        "context_length_exceeded",
    )


def _template(given: str | None) -> str | None:
    """A template, from itself or from the path of a file."""
    if given is None or "{" in given:
        return given
    try:
        return Path(given).read_text()
    except OSError as error:
        raise ConfigError(f"chat template {given!r} can't be read: {error.strerror}") from error
