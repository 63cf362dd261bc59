"""ModelText: the tokenizer and its chat template, used in threads so that the event loop goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hf_paged.errors import ConfigError, InvalidRequestError
from hf_paged.hf.load import load_tokenizer
from hf_paged.server import heavy
from hf_paged.server.config import ServerConfig
from hf_paged.server.errors import APIError, invalid
from hf_paged.server.pace import Pace, bounded
from hf_paged.server.text.request_templates import RequestTemplates
from hf_paged.text.bad_words import banned_ids
from hf_paged.text.templates import render
from hf_paged.text.tokens import TokenTexts

THREADS = 4
LONG_THREADS = 1  # only one: long calls into C hold the GIL; see `heavy`
LONG = 2**18  # characters; longer texts use the long threads, so that shorter ones do not wait for them
MOST_WAITING = 2**26  # limit on the characters that wait or are tokenised; a single text may be longer
CHARACTERS_A_SECOND = 1_000_000  # assumed speed of tokenising, until it is measured
MOST_TOKENS = 2**18  # limit on the tokens of a text where the model's context is none
PIECE = 50_000  # characters tokenised at a time while a text may be too long; also the most ids of a short text
SEAM = 8  # tokens that cutting a text may add at a seam


class _TooLong(Exception):
    """A text has more tokens than this."""


class ModelText:
    """Text to ids and back, for one model.

    Args:
        tokenizer: the model's.
        chat_template: instead of the tokenizer's own.

    Attributes:
        tokens: the text and the bytes of single tokens.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        own = tokenizer.chat_template
        self.chat_template = chat_template or (own if isinstance(own, str) else None)
        self._several = isinstance(own, dict)  # the tokenizer chooses one, by whether there are tools
        self.tokens = TokenTexts(tokenizer)
        self._request_templates = RequestTemplates(tokenizer)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="text")
        self._long_threads = ThreadPoolExecutor(LONG_THREADS, thread_name_prefix="long-text")
        self._characters = 0  # that wait, or are tokenised
        self._pace = Pace()  # of characters

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

    def close(self) -> None:
        """End the threads."""
        for threads in (self._threads, self._long_threads):
            threads.shutdown(wait=False, cancel_futures=True)
        self._request_templates.close()

    # -------------------------------------------------------------------------------------------------- text to ids

    async def encode(self, text: str, *, special: bool, most: int, param: str, context: bool = True) -> list[int]:
        """The ids of a text. Cancelled, it ends soon.

        Args:
            special: add the special tokens that the tokenizer adds.
            most: ids that may come of it; a text that is far too long is refused before all of it is tokenised.
            param: the field that the text is from.
            context: `most` is the model's context length; else it is only the server's limit.

        Raises:
            APIError: 400, it is too long; 429, too much text waits to be tokenised.
        """
        if self._characters and self._characters + len(text) > MOST_WAITING:
            message = f"{self._characters} characters of text wait to be tokenised, and {MOST_WAITING} may"
            after = (self._characters + len(text) - MOST_WAITING) / (self._pace.rate or CHARACTERS_A_SECOND)
            raise APIError(429, message, param=param, code="queue_full", retry_after=bounded(after))
        threads = self._threads if len(text) <= LONG else self._long_threads
        gone = threading.Event()
        self._characters += len(text)
        self._pace.watch(True)
        try:
            ids = await heavy.run(self._encode, text, special, most, gone, threads=threads)
            self._pace.done(len(text))
            return ids
        except _TooLong as error:
            if context:
                raise too_long(f"more than {error}", most, param) from None
            raise invalid(
                f"the {param} is more than {error} tokens; the server tokenises at most {most}", param
            ) from None
        finally:
            self._characters -= len(text)
            self._pace.watch(self._characters > 0)
            gone.set()

    def _encode(self, text: str, special: bool, most: int, gone: threading.Event) -> list[int]:
        if len(text) > max(PIECE, most):
            seen = 0
            for number, start in enumerate(range(0, len(text), PIECE)):
                if gone.is_set():
                    return []
                seen += len(self.tokenizer.encode(text[start : start + PIECE], add_special_tokens=False))
                if seen > most + SEAM * (number + 1):
                    raise _TooLong(seen - SEAM * (number + 1))
        return list(self.tokenizer.encode(text, add_special_tokens=special))

    async def banned(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The token sequences of bad words.

        Raises:
            APIError: 400, the tokenizer has no tokens for one.
        """
        try:
            return await heavy.run(banned_ids, self.tokenizer, words, threads=self._threads)
        except InvalidRequestError as error:
            raise invalid(str(error), "bad_words") from error

    async def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of ids."""
        threads = self._threads if len(ids) <= PIECE else self._long_threads
        return await heavy.run(self.tokenizer.decode, list(ids), skip_special_tokens=skip_special, threads=threads)

    async def render(
        self,
        messages: Iterable[Mapping[str, Any]],
        *,
        tools: Iterable[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_options: Mapping[str, Any] | None = None,
        param: str = "messages",
    ) -> str:
        """What the chat template makes of a conversation.

        Args:
            messages, tools: gone through in a thread, so that a generator may be what makes them.
            chat_template: one that the call brings. Unless the model has it too, another process renders it, within
                limits.
            param: the field that the conversation is from.

        Raises:
            APIError: 400, there is no template, it refuses the conversation, or it goes beyond a limit; for more, see
                `RequestTemplates.render`.
        """
        template = chat_template or self.chat_template
        if not template and not self._several:
            raise invalid(
                "the model has no chat template; start the server with --chat-template, or use /v1/completions", param
            )
        rendered = self._request_templates.render if self._is_foreign(chat_template) else self._render
        try:
            return await rendered(
                messages,
                tools=tools,
                documents=documents,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                options=template_options,
            )
        except ConfigError as error:
            raise invalid(str(error), "chat_template_kwargs") from error
        except InvalidRequestError as error:
            raise invalid(str(error), param) from error

    def _is_foreign(self, chat_template: str | None) -> bool:
        """Whether a call brings this template: it is neither the model's own nor the name of one."""
        own = self.tokenizer.chat_template
        known = own if isinstance(own, dict) else ()
        return bool(chat_template) and chat_template != self.chat_template and chat_template not in known

    async def _render(
        self, messages: Iterable[Mapping[str, Any]], *, tools: Iterable[Mapping[str, Any]] | None, **given: Any
    ) -> str:
        def work() -> str:
            return render(self.tokenizer, list(messages), tools=None if tools is None else list(tools), **given)

        return await heavy.run(work, threads=self._threads)


def too_long(count: int | str, most: int, param: str, output: int = 0, fault: str | None = None) -> APIError:
    """The 400 for a prompt that doesn't fit. `param`: the field that it is from; `fault`: another one, to be named."""
    wanted = f" and {output} in the completion" if output else ""
    return invalid(
        f"This model's maximum context length is {most} tokens, but the request has {count} in the {param}{wanted}; "
        "shorten one of them",
        fault or param,
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
