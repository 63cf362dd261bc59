"""The attention function and the mask function that Transformers calls, and how they find the step they belong to.

The step travels with the call in a ContextVar: set for one forward, in one thread, and seen by every layer below it,
also where a family drops the keyword arguments it doesn't know. A forward of another thread, which may be training the
same model at that moment, sees no step and gets the attention that its config asked for.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_paged.batch import LayerSpec
from hf_paged.errors import UnsupportedModelError
from hf_paged.forks import after_fork, renewed_after_fork
from hf_paged.ledger import Ledger
from hf_paged.protocols import LayerPlan, RotaryPlan

NAME = "hf_paged"


@dataclasses.dataclass
class SeenLayer:
    """One attention call of the forward in which a model was looked at: who called, and with what."""

    module: nn.Module
    spec: LayerSpec
    dtype: torch.dtype
    scale: float
    softcap: float | None
    sinks: torch.Tensor | None


class PagedStep:
    """One forward of one batch: which layer comes next, and what carries it.

    Layers are told apart by the order in which they call: a layer index may be missing, or stand for two attentions.

    Args:
        plan: what each layer runs.
        modules: the attention modules in the order in which they call.
        wanted: int64 [S], the tokens whose logits are asked for.
        fusion: whose fused forwards serve this step, or None: the modules' own do.

    Attributes:
        position: which layer comes next.
    """

    def __init__(
        self, plan: LayerPlan, modules: Sequence[nn.Module], wanted: torch.Tensor, fusion: object = None
    ) -> None:
        self._plan = plan
        self._modules = modules
        self.wanted = wanted
        self.fusion = fusion
        self.position = 0

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """One layer. Query [1, heads, T, head_dim], key and value likewise; returns [1, T, heads, value_head_dim]."""
        index, self.position = self.position, self.position + 1
        if index >= len(self._modules) or self._modules[index] is not module:
            raise UnsupportedModelError(
                f"attention call {index} of the forward came from another module than when the model was looked at; "
                "patch the model again after changing its modules"
            )
        tokens = (x[0].transpose(0, 1) for x in (query, key, value))
        return self._plan.run(index, *tokens, scale=scale, softcap=softcap, sinks=sinks)[None]

    def rotate_and_attend(
        self,
        index: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rotary: dict[str, Any] | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Layer `index`, from queries, keys and values [T, heads, head_dim] that are still to be rotated.

        Args:
            rotary: cos, sin and interleaved, see `RotaryPlan.run_rotary`; or None: they aren't rotated at all.
            options: scale, softcap and sinks.

        Returns:
            [T, heads, value_head_dim].
        """
        if index != self.position:
            raise UnsupportedModelError(f"attention layer {index} came where {self.position} was due")
        self.position += 1
        if rotary is None:
            return self._plan.run(index, query, key, value, **options)
        return cast(RotaryPlan, self._plan).run_rotary(index, query, key, value, **rotary, **options)

    def mask(self, mask_function: Callable[..., Any], num_tokens: int) -> torch.Tensor | None:
        """The mask that a model asks for: none, for the plan knows the windows."""
        return None


_step: ContextVar[PagedStep | None] = ContextVar("hf_paged_step", default=None)


def current_step() -> PagedStep | None:
    """The step that the forward under way in this thread belongs to, if it is one of ours."""
    return _step.get()


@contextmanager
def stepping(step: PagedStep) -> Iterator[None]:
    """Let the attention layers of the forwards inside belong to a step."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What Transformers calls for each attention layer under the name `hf_paged`; see its attention interface."""
    step = _step.get()
    if step is None:
        options = {"scaling": scaling, "dropout": dropout, "softcap": softcap, "s_aux": s_aux}
        options = {name: option for name, option in options.items() if option is not None}
        return _own_attention(module)(module, query, key, value, attention_mask, **options, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModelError("attention scores get a position bias, which the paged attention does not add")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    # A layer that passes None means full attention, whatever its module holds.
    window = kwargs["sliding_window"] if "sliding_window" in kwargs else getattr(module, "sliding_window", None)
    return step.attend(module, query, key, value, attention_mask, scale, window, softcap, s_aux), None


def paged_mask(*args: Any, config: Any = None, **kwargs: Any) -> Any:
    """What Transformers calls for a mask under the name `hf_paged`: the step's inside one, the usual one outside."""
    step = _step.get()
    if step is not None:
        return step.mask(kwargs["mask_function"], kwargs["q_length"])
    name = _switched.own(config) if config is not None else "sdpa"
    return ALL_MASK_ATTENTION_FUNCTIONS[name](*args, config=config, **kwargs)


class _OurName(str):
    """Our attention's name in a config that is switched; a copy of the config has its own attention.

    Attributes:
        own: the attention that the config has when it isn't switched.
    """

    own: str

    @classmethod
    def over(cls, own: str) -> _OurName:
        """Our name, in the place of `own`."""
        name = cls(NAME)
        name.own = own.own if isinstance(own, _OurName) else own
        return name

    def __reduce_ex__(self, protocol: Any) -> Any:
        return str, (self.own,)


class _Switched:
    """Which configs have their attention switched to ours at the moment, by which forwards, and what they had.

    Restoring may be done twice: an interrupt can break it off anywhere.
    """

    def __init__(self) -> None:
        self._lock = renewed_after_fork(threading.Lock())
        self._own: dict[int, tuple[Any, str, set[object]]] = {}
        after_fork(self._restore_all)

    def own(self, config: Any) -> str:
        """The attention that a config has when it isn't switched."""
        with self._lock:
            known = self._own.get(id(config))
            name = known[1] if known else config._attn_implementation
            return name.own if isinstance(name, _OurName) else name

    def switch(self, config: Any, forward: object) -> None:
        with self._lock:
            *_, forwards = self._own.setdefault(id(config), (config, config._attn_implementation, set()))
            forwards.add(forward)
            config._attn_implementation_internal = _OurName.over(config._attn_implementation)

    def restore(self, configs: Sequence[Any], forward: object) -> None:
        for config in configs:
            with self._lock:
                _, name, forwards = self._own.get(id(config), (config, None, {forward}))
                forwards.discard(forward)
                if not forwards and name is not None:
                    config._attn_implementation_internal = name
                    del self._own[id(config)]

    def _restore_all(self) -> None:
        """In a forked child, which has none of the forwards under way."""
        for config, name, _ in self._own.values():
            config._attn_implementation_internal = name
        self._own.clear()


_switched = _Switched()


@contextmanager
def switched(configs: Sequence[Any]) -> Iterator[None]:
    """Have the configs ask for our attention for the length of a forward."""
    forward = object()
    try:
        registration.acquire(forward)  # the model may be unpatched meanwhile, by another thread
        for config in configs:
            _switched.switch(config, forward)
        yield
    finally:
        try:
            _restore(configs, forward)
        except BaseException:  # an interrupt must not leave a config switched
            _restore(configs, forward)
            raise


def _restore(configs: Sequence[Any], forward: object) -> None:
    _switched.restore(configs, forward)
    registration.release(forward)


def _own_attention(module: nn.Module) -> Callable[..., Any]:
    """The attention that a module would have called, were its config not switched."""
    name = _switched.own(module.config)
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


class _Registration:
    """Our entries in Transformers' registries: there while a model is patched or a forward of ours runs, then gone."""

    def __init__(self) -> None:
        # A model's end releases, and may come at any line of this thread.
        self._lock = renewed_after_fork(threading.RLock())
        self._users: set[object] = set()
        self._ledger = Ledger()

    def acquire(self, user: object) -> None:
        """Have them there until that user releases them."""
        with self._lock:
            self._users.add(user)
            if not self._ledger.entries:
                # Masks are looked up in the mapping of the class; the attention goes there too, so that families with a
                # registry of their own find it.
                self._ledger.set_item(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, NAME, paged_attention)
                self._ledger.set_item(type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping, NAME, paged_mask)

    def release(self, user: object) -> None:
        """One user less; does no harm when done twice."""
        with self._lock:
            self._users.discard(user)
            if not self._users:
                self._ledger.undo()


registration = _Registration()
