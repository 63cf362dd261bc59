"""Models by name, and random ones in a config's shape."""

from __future__ import annotations

import pytest
import torch

import zoo
from hf_paged import ConfigError
from hf_paged.hf.load import load_model, model_for, random_model


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


def test_a_name_is_loaded_or_gives_its_shape_to_random_weights(tmp_path):
    saved = zoo.build("llama")
    saved.lm_head.weight.data += 1.0
    saved.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device=torch.device("cpu"))
    drawn = load_model(str(tmp_path), device=torch.device("cpu"), random=True)
    assert torch.equal(loaded.lm_head.weight, saved.lm_head.weight)
    assert torch.equal(drawn.lm_head.weight, random_model(saved.config, torch.device("cpu")).lm_head.weight)
    assert not torch.equal(drawn.lm_head.weight, saved.lm_head.weight)
    assert not loaded.training


@pytest.mark.parametrize(
    ("name", "device", "words"),
    [("no/such/model", None, "model 'no/such/model' can't be loaded"), (".", "abacus", "unknown device 'abacus'")],
)
def test_what_a_command_line_names_wrongly_is_a_config_error(name, device, words):
    with pytest.raises(ConfigError, match=words):
        model_for(name, device)
