"""Workloads: what is asked for, the same for every engine. Fixed seeds, so that anyone can rebuild them."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path

from hf_paged.errors import ConfigError
from hf_paged.params import SamplingParams


@dataclasses.dataclass(frozen=True)
class Item:
    """One request: a prompt, and how many tokens to generate, end-of-sequence or not."""

    prompt_token_ids: list[int]
    max_tokens: int

    @property
    def params(self) -> SamplingParams:
        """How the engine is asked for them: the likeliest ones, and as many."""
        return greedy(self.max_tokens)


@dataclasses.dataclass(frozen=True)
class Workload:
    """Requests that are all submitted at the start.

    Attributes:
        name: `A`, `cpu`, or the file's name.
        items: the requests.
    """

    name: str
    items: Sequence[Item]

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(len(item.prompt_token_ids) for item in self.items)

    @property
    def output_tokens(self) -> int:
        """Tokens asked for, over all requests: the only ones that count as useful."""
        return sum(item.max_tokens for item in self.items)


def greedy(max_tokens: int) -> SamplingParams:
    """The likeliest tokens, whatever ends a text."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)


def ragged(vocab_size: int = 128256) -> Workload:
    """Workload A: 512 requests, prompts of 32 to 1024 tokens, outputs of 32 to 512."""
    lengths = random.Random(0)
    ids = random.Random(1)
    items = []
    for _ in range(512):
        prompt, output = lengths.randint(32, 1024), lengths.randint(32, 512)
        items.append(Item([ids.randrange(vocab_size) for _ in range(prompt)], output))
    return Workload("A", items)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Requests of one length: their number, and the prompt and output tokens of each."""

    requests: int
    prompt: int
    output: int

    def items(self, vocab_size: int, seed: int, output: int | None = None) -> list[Item]:
        """The requests, with random ids of their own for each seed and shape: no run finds another's prefixes."""
        ids = random.Random(f"{self.requests} of {self.prompt}, {seed}")
        prompts = [[ids.randrange(vocab_size) for _ in range(self.prompt)] for _ in range(self.requests)]
        return [Item(prompt, output or self.output) for prompt in prompts]


# B, C and D measure a decode step, E prefill.
UNIFORM = {
    "B": Uniform(1, 128, 256),
    "C": Uniform(8, 512, 256),
    "D": Uniform(64, 512, 256),
    "E": Uniform(16, 2048, 1),
}


def cpu() -> Workload:
    """Workload cpu: 32 requests for a small model, prompts of 16 to 256 tokens, outputs of 16 to 128."""
    r = random.Random(0)
    items = [Item([r.randrange(100, 49000) for _ in range(r.randint(16, 256))], r.randint(16, 128)) for _ in range(32)]
    return Workload("cpu", items)


def read(path: Path) -> Workload:
    """A workload from a file of JSON lines: `{"prompt_token_ids": [...], "max_tokens": n}`.

    Raises:
        ConfigError: the file doesn't exist, or a line isn't a request; the message names the line.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(
            f"workload {str(path)!r} is neither A, cpu nor a file that can be read: {error.strerror}"
        ) from error
    items = [_item(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise ConfigError(f"{path} holds no requests; a line is {_FORM}")
    return Workload(path.name, items)


def load(name: str, vocab_size: int) -> Workload:
    """The workload of that name, or the file's, for a model with that vocabulary.

    Raises:
        ConfigError: there is none, or it asks for ids that the model doesn't have.
    """
    if name == "A":
        return ragged(vocab_size)
    workload = cpu() if name == "cpu" else read(Path(name))
    highest = max(max(item.prompt_token_ids) for item in workload.items)
    if highest >= vocab_size:
        raise ConfigError(f"workload {name!r} has token id {highest}, but the model knows ids below {vocab_size}")
    return workload


_FORM = '{"prompt_token_ids": [ids of at least one token], "max_tokens": at least 1}'


def _item(line: str, where: str) -> Item:
    try:
        found = json.loads(line)
        ids, tokens = found["prompt_token_ids"], found["max_tokens"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where} is not a request: {line[:80]!r}; a line is {_FORM}") from error
    good = isinstance(ids, list) and ids and all(type(value) is int and value >= 0 for value in ids)
    if not good or type(tokens) is not int or tokens < 1:
        raise ConfigError(f"{where} is not a request: {line[:80]!r}; a line is {_FORM}")
    return Item(ids, tokens)
