"""The cache that `generate(return_dict_in_generate=True)` returns, computed when somebody looks at it."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from hf_paged.errors import UnsupportedCallError
from hf_paged.hf.compat import with_cache
from hf_paged.hf.spec import check_mode
from hf_paged.hf.weights import WeightWatch


class ReplayedCache(DynamicCache):
    """Stock's cache after a call: keys and values of every token but the last.

    The engine's blocks went back to the pool when the call ended, and few callers ever read this. At the first use (any
    attribute, a copy, a pickle) a forward over the sequences computes it, if the weights are still the same. From then
    on it is an ordinary DynamicCache, which knows nothing of the model. Attributes that were set before stay. Several
    threads may use it first at the same time: one computes, the others wait.

    Args:
        model: what the call ran on.
        sequences: int64 [rows, tokens], padded.
        visible: bool [rows, width], the tokens of the padded prompts that the attention mask shows.
    """

    def __init__(self, model: PreTrainedModel, sequences: torch.Tensor, visible: torch.Tensor) -> None:
        # Not the base's: what it sets is missing until the first use, which is how that is noticed.
        weights = WeightWatch(model)
        # Without places: layers that were fused in the engine have their weights elsewhere once it is gone.
        self._replay = model, sequences, visible, weights, weights.fingerprint(places=False)
        self._lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("__"):
            _compute(self)
        if isinstance(self, ReplayedCache):  # still
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self, name)  # of the class that it has now

    def __repr__(self) -> str:
        replay = vars(self).get("_replay")
        if replay is None:  # another thread computed it just now
            return repr(self)
        sequences = replay[1]
        return f"DynamicCache({len(sequences)} rows of {sequences.shape[1] - 1} tokens, computed when it is first used)"

    def __copy__(self) -> DynamicCache:
        _compute(self)
        return copy.copy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> DynamicCache:
        _compute(self)
        return copy.deepcopy(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _compute(self)
        return self.__reduce_ex__(protocol)


def _compute(cache: ReplayedCache) -> None:
    """Compute keys and values, and make the cache the DynamicCache that stock returns.

    No method: another thread may have changed the cache's class by now, and then nothing is left to do.

    Raises:
        UnsupportedCallError: the weights have changed.
    """
    own: dict[str, Any] = cache.__dict__
    lock = own.get("_lock")
    if lock is None:
        return
    with lock:
        if not isinstance(cache, ReplayedCache):
            return
        model, sequences, visible, weights, fingerprint = own["_replay"]
        check_mode(model)
        if weights.fingerprint(places=False) != fingerprint:
            raise UnsupportedCallError(
                "the weights or adapters changed after generate() returned this cache, which is computed when it is "
                "first read; read it earlier (cache.get_seq_length() will do), or take the patch off for this call"
            )
        computed = _replayed(model, sequences[:, :-1].to(model.device), visible.to(model.device))
        for name, value in vars(computed).items():
            own.setdefault(name, value)
        # In this order: as long as the class is ours, the parts that `__getattr__` and `__repr__` need are there.
        cache.__class__ = DynamicCache
        del own["_replay"], own["_lock"]


def _replayed(model: PreTrainedModel, tokens: torch.Tensor, visible: torch.Tensor) -> DynamicCache:
    """The cache after a forward over tokens, int64 [rows, tokens]; `visible` is the mask of the first columns."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    width = visible.shape[1]
    mask = torch.ones_like(tokens)
    mask[:, :width] = visible
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    # The prompt first, as stock computes it: what a hidden token's keys are depends on how many tokens are beside it.
    for begin, end in ((0, width), (width, tokens.shape[1])):
        if begin < end:
            with torch.no_grad():
                model(
                    input_ids=tokens[:, begin:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, begin:end],
                    use_cache=True,
                    **with_cache(cache),
                )
    return cache
