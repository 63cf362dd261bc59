"""Models by name, and random ones in a config's shape."""

from __future__ import annotations

import pytest
import torch

import zoo
from hf_paged import ConfigError
from hf_paged.hf.load import random_model


def test_a_random_model_is_the_same_each_time():
    config = zoo.build("llama").config
    before = torch.random.get_rng_state()
    one, two = (random_model(config, torch.device("cpu")) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not one.training
    for mine, other in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert next(random_model(config, torch.device("cpu"), "float16").parameters()).dtype == torch.float16


def test_quantised_weights_are_not_drawn():
    config = zoo.build("llama").config
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ConfigError, match="quantization_config"):
        random_model(config, torch.device("cpu"))
