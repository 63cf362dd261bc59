"""explain(model): what hf_paged would do with a model, and why."""

from __future__ import annotations

import dataclasses
from typing import Any

from hf_paged.batch import CacheSpec
from hf_paged.config import PagedConfig
from hf_paged.errors import UnsupportedModelError
from hf_paged.hf import seam
from hf_paged.hf.handle import PatchedModel, patched
from hf_paged.hf.prepare import SeamBroken
from hf_paged.hf.spec import unwrap


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What a plain `model.generate(input_ids)` runs on under `patch`, and how the model is carried.

    Attributes:
        model: its class.
        path: "flat" (paged attention over flat batches) or "stock" (Transformers' own `generate()`).
        reason: why a plain call isn't carried, or None.
        backend: the attention backend's name, or None where the model can't be carried. With a reason beside it, the
            model can be carried, by `LLM` for instance, but a plain `generate()` is not.
        spec: its attention layers, or None.
        patched: whether it is patched at the moment.
        fused: what fused kernels do for it, or why they do nothing, a line each.
    """

    model: str
    path: str
    reason: str | None
    backend: str | None
    spec: CacheSpec | None
    patched: bool
    fused: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.model}: path {self.path}" + (", patched" if self.patched else "")]
        if self.reason is not None:
            lines.append(f"  runs as in Transformers: {self.reason}")
            if self.spec is not None:
                lines.append("  the model itself can be carried: hf_paged.LLM and the server can run it")
        if self.spec is not None:
            lines.append(f"  attention backend {self.backend}, KV {self.spec.dtype} on {self.spec.device}")
            for group, window in enumerate(self.spec.windows):
                layers = sum(layer.window == window for layer in self.spec.layers)
                kind = "full attention" if window is None else f"sliding window of {window} tokens"
                lines.append(f"  {layers} layers with {kind}: {self.spec.token_bytes(group):,} bytes of KV a token")
        lines += [f"  {line}" for line in self.fused]
        return "\n".join(lines)


def explain(model: Any, config: PagedConfig | None = None, **options: Any) -> Explanation:
    """What `patch` would do with a model and a plain `generate()`. Tries it on a few tokens, and leaves it as it is.

    Args:
        model: as for `patch`.
        config: the options; None: those that it is patched with, if it is.
        options: single options of PagedConfig, over those of `config`.

    Raises:
        UnsupportedModelError: it is no Transformers model.
        ConfigError: an option is wrong.
    """
    inner = unwrap(model)
    name, handle = type(inner).__name__, patched(inner)
    wanted = PagedConfig.of(handle.config if config is None and handle is not None else config, options)
    trial = PatchedModel(inner, wanted)
    try:
        if trial.reason is not None:
            raise UnsupportedModelError(trial.reason)
        built, _ = trial.engine()
        backend, spec = built.info.attention_backend, built.engine.model.spec
        fused = tuple(built.fusion.report()) if built.fusion is not None else (f"not fused: {built.unfused}",)
        reason = seam.why_stock(inner)
        said = seam.told(reason) if isinstance(reason, SeamBroken) else None if reason is None else str(reason)
        path = "flat" if reason is None else "stock"
        return Explanation(name, path, said, backend, spec, handle is not None, fused)
    except UnsupportedModelError as error:
        return Explanation(name, "stock", str(error), None, None, handle is not None)
    finally:
        trial.remove()
