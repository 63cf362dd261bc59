"""What an engine process builds, in this process and without sockets."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_paged.hf.attention import NAME
from hf_paged.server.config import ServerConfig
from hf_paged.server.worker import Orders, build


def merged(attention: Any) -> bool:
    """Whether the projections of an attention are one weight, as its fused layer has them."""
    storages = {projection.weight.untyped_storage().data_ptr() for projection in (attention.q_proj, attention.k_proj)}
    return len(storages) == 1


def test_fused_layers_and_registries_last_as_long_as_the_loop(tiny_model: Path) -> None:
    sockets: Any = None  # nothing is sent before the loop runs
    loop, ready = build(Orders(0, 1, "", "", ServerConfig(model=str(tiny_model))), sockets, sockets)
    gc.collect()
    flat: Any = loop._engine.model
    assert ready.num_blocks > 0
    assert flat.fusion.users == 1
    model = flat._model()
    attention = model.model.layers[0].self_attn
    assert merged(attention)
    assert NAME in ALL_ATTENTION_FUNCTIONS
    loop._engine.close()
    del loop
    gc.collect()
    assert not merged(attention)
    assert NAME not in ALL_ATTENTION_FUNCTIONS
