"""`llm.llm_engine`: what programs for vLLM read of an engine and its model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hf_paged.engine.engine import Engine


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What programs for vLLM read of a model under `llm.llm_engine.model_config`.

    Attributes:
        model, tokenizer: the names or paths that they were loaded by, or "".
        max_model_len: most tokens of one request, prompt and output.
        dtype: of the weights. seed: of the engine's draws.
        hf_config: Transformers' config. hf_text_config: the part of it that is about text.
        trust_remote_code, revision, tokenizer_revision: as given. quantization: None.
    """

    model: str
    tokenizer: str
    max_model_len: int
    dtype: Any
    seed: int
    hf_config: Any = dataclasses.field(repr=False)
    trust_remote_code: bool
    revision: str | None
    tokenizer_revision: str | None
    quantization: None = None

    @property
    def hf_text_config(self) -> Any:
        """The part of the config that is about text."""
        return self.hf_config.get_text_config()

    def get_vocab_size(self) -> int:
        """How many ids the model has."""
        return int(self.hf_text_config.vocab_size)


@dataclasses.dataclass(frozen=True)
class LLMEngine:
    """`llm.llm_engine`: what programs for vLLM read of an engine. To step one, see `LLM.engine`."""

    model_config: ModelConfig


def engine_view(model: Any, tokenizer: Any, engine: Engine, loaded_with: Mapping[str, Any]) -> LLMEngine:
    """`llm.llm_engine` of a Transformers model, its tokenizer or None, its engine, and what `LLM` was given."""
    longest = engine.pool.longest
    return LLMEngine(
        ModelConfig(
            model=model.name_or_path,
            tokenizer=getattr(tokenizer, "name_or_path", ""),
            max_model_len=min(longest, engine.max_model_len or longest),
            dtype=model.dtype,
            hf_config=model.config,
            **loaded_with,
        )
    )
