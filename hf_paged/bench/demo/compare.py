"""The same prompts through stock `generate()` and through the patched one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hf_paged.bench import static
from hf_paged.bench.run import KVUse, Run
from hf_paged.bench.workloads import Item
from hf_paged.hf.patch import paged

WARM_UP = [Item([7] * 20, 4)]  # shares no block with any prompt


@dataclasses.dataclass(frozen=True)
class Chat:
    """A model, its tokenizer, and what ends a text.

    Attributes:
        model: a Transformers model.
        tokenizer: its tokenizer.
        eos: ids that end a text, from the model's generation config.
        pad: the id to pad with.
    """

    model: Any
    tokenizer: Any
    eos: frozenset[int]
    pad: int

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Chat:
        """Read what ends a text and what pads it from the model and its tokenizer."""
        ids = model.generation_config.eos_token_id
        eos = frozenset([ids] if isinstance(ids, int) else ids or ())
        pad = tokenizer.pad_token_id
        return cls(model, tokenizer, eos, pad if pad is not None else min(eos, default=0))

    def encode(self, text: str, raw: bool = False) -> list[int]:
        """A prompt's ids: the text as a user's turn where the tokenizer has a chat template, or as it is (`raw`)."""
        if raw or not self.tokenizer.chat_template:
            return list(self.tokenizer(text)["input_ids"])
        turn = [{"role": "user", "content": text}]
        text = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """An answer's text."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def stock(chat: Chat, items: Sequence[Item], batch_size: int, done: Callable[[int], None]) -> Run:
    """Stock `generate()`, greedy, over left-padded batches."""
    static.run(chat.model, WARM_UP, 1, chat.pad)
    return static.run(chat.model, items, batch_size, chat.pad, chat.eos, done)


def patched(chat: Chat, items: Sequence[Item], sampling: Mapping[str, Any], options: Mapping[str, Any]) -> Run:
    """The patched `generate()`: one call with every prompt, left-padded as stock wants them.

    Args:
        chat: the model.
        items: the prompts; all with the same number of tokens.
        sampling: arguments of `generate()`; empty: greedy.
        options: options of hf_paged.
    """
    how = sampling or static.GREEDY
    with paged(chat.model, **options) as handle:
        static.generate(chat.model, WARM_UP, chat.pad, chat.eos, how)
        before, began = handle.stats, time.perf_counter()
        outputs, _ = static.generate(chat.model, items, chat.pad, chat.eos, how)
        return Run(time.perf_counter() - began, outputs, KVUse.between(before, handle.stats))
