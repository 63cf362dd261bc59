"""What an engine process builds, in this process and without sockets."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from hf_paged.server.config import ServerConfig
from hf_paged.server.worker import Orders, build


def test_fused_layers_and_registries_last_as_long_as_the_loop(tiny_model: Path) -> None:
    sockets: Any = None  # nothing is sent before the loop runs
    llm, loop, ready = build(Orders(0, 1, "", "", ServerConfig(model=str(tiny_model))), sockets, sockets)
    try:
        gc.collect()
        assert ready.num_blocks > 0
        assert [name for name, module in llm.model.named_modules() if "forward" in vars(module)]
        assert loop._engine.model.fusion.users == 1
    finally:
        llm.close()
