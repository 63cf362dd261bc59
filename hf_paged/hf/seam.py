"""Whether `generate()` reaches the engine with the installed release of Transformers, and what is said if not."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from hf_paged.errors import first_line
from hf_paged.hf import compat
from hf_paged.hf.notices import warn
from hf_paged.hf.params import special_ids
from hf_paged.hf.prepare import STOCK_GENERATE, SeamBroken, Unsupported, check, hand_over, read

_said: set[str] = set()  # releases that a process was told of


def why_stock(model: PreTrainedModel) -> Unsupported | None:
    """Why `model.generate(input_ids)`, with nothing else given, would run as in Transformers.

    Returns:
        None: it reaches the engine. A `SeamBroken`: no call of the model does, with this release of Transformers. Any
        other reason: the model's own generation config asks for what isn't carried.
    """
    ids = torch.tensor([[_ordinary_id(model)] * 2], device=model.get_input_embeddings().weight.device)
    plain: dict[str, Any] = {"input_ids": ids, "max_new_tokens": 1, "pad_token_id": _padding_id(model)}
    try:
        check(model, plain)
        call = read(hand_over(model, plain), plain)
        compat.decoder_output(ids, None, None, None)
    except Unsupported as reason:
        return reason
    except Exception as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        if _stock_raises(model, plain):
            return Unsupported(f"Transformers itself raises for a plain call, {said}")
        return SeamBroken(said)
    if call.prompts != ids.tolist():
        return SeamBroken(f"the preparation makes {call.prompts} of the ids {ids.tolist()}")
    return None


def _stock_raises(model: PreTrainedModel, plain: dict[str, Any]) -> bool:
    """Whether the model's own generation config, rather than the way in, is what fails."""
    devices = [plain["input_ids"].device] if plain["input_ids"].device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            STOCK_GENERATE(model, **plain)
    except Exception:
        return True
    return False


def told(broken: SeamBroken) -> str:
    """The reason with which release is installed and which were tested."""
    return (
        f"NOTHING of generate() runs on the engine with Transformers {compat.release()} (tested: {compat.TESTED[0]} to "
        f"{compat.TESTED[-1]}): {broken}; install a tested release, or a newer hf_paged"
    )


def tell_newer_release() -> None:
    """Say once a process that the installed Transformers is newer than any that was tested."""
    if compat.is_newer_than_tested() and compat.release() not in _said:
        _said.add(compat.release())
        warn(
            f"hf_paged: Transformers {compat.release()} is newer than the newest tested release {compat.TESTED[-1]}; "
            "hf_paged.explain(model) tells whether generate() still runs on the engine"
        )


def _ordinary_id(model: PreTrainedModel) -> int:
    """An id without a special meaning, where there is one."""
    special = special_ids(model)
    return next((token for token in range(model.get_input_embeddings().weight.shape[0]) if token not in special), 0)


def _padding_id(model: PreTrainedModel) -> int:
    """The padding that the model has, or any: without one Transformers prints a line."""
    pad = getattr(model.generation_config, "pad_token_id", None)
    return pad if pad is not None else 0
