"""What an engine process builds, in this process and without sockets."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_paged.hf.attention import NAME
from hf_paged.server.config import ServerConfig
from hf_paged.server.worker import Orders, build


def test_fused_layers_and_registries_last_as_long_as_the_loop(tiny_model: Path) -> None:
    sockets: Any = None  # nothing is sent before the loop runs
    loop, ready = build(Orders(0, 1, "", "", ServerConfig(model=str(tiny_model))), sockets, sockets)
    gc.collect()
    flat: Any = loop._engine.model
    assert ready.num_blocks > 0
    assert flat.fusion.users == 1
    assert "forward" in vars(flat._model.model.layers[0])
    assert NAME in ALL_ATTENTION_FUNCTIONS
    loop._engine.close()
    del loop
    gc.collect()
    assert "forward" not in vars(flat._model.model.layers[0])
    assert NAME not in ALL_ATTENTION_FUNCTIONS
