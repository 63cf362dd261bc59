"""Tiny vision-language models, random but seeded: text models of the zoo's size with a tower of one layer beside."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASS_NAMES

import zoo

IMAGE = 250  # ids from here on stand for images
TOWER: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 4,
    "num_heads": 4, "image_size": 32, "patch_size": 8, "embed_dim": 64, "out_hidden_size": 64, "projection_dim": 64,
    "deepstack_visual_indexes": [0], "fullatt_block_indexes": [0], "num_position_embeddings": 16,
}  # fmt: skip


def build(family: str) -> PreTrainedModel:
    """A tiny model of `family`, in eval mode: the same one each time."""
    module = importlib.import_module(f"transformers.models.{model_type_to_module_name(family)}")
    model_class = getattr(module, CLASS_NAMES[family])
    config_class = model_class.config_class
    default = config_class()
    parts = {name: _tiny(name, getattr(default, name)) for name in config_class.sub_configs}
    names = [f.name for f in dataclasses.fields(config_class) if f.name.endswith(("token_id", "token_index"))]
    ids = {name: IMAGE + place % 6 for place, name in enumerate(names) if name[:3] not in ("pad", "bos", "eos")}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(config_class(**parts, **ids)).float().eval()
        for parameter in model.parameters():
            if parameter.numel() > 1 and parameter.std() < zoo.STD / 4:
                parameter += zoo.STD * torch.randn_like(parameter)
    model.generation_config.update(pad_token_id=zoo.PAD, bos_token_id=zoo.BOS, eos_token_id=zoo.EOS)
    return model


def _tiny(name: str, default: PreTrainedConfig) -> dict[str, Any]:
    sizes = zoo.SIZES if "text" in name else TOWER
    fields = {field.name for field in dataclasses.fields(default)}
    own = {field: size for key, size in sizes.items() if (field := default.attribute_map.get(key, key)) in fields}
    if "text" in name:
        kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ["full_attention"]))
        own |= {"num_hidden_layers": max(2, len(kinds))}
        own |= {"layer_types": (kinds * 2)[: own["num_hidden_layers"]]} if "layer_types" in fields else {}
        rope = getattr(default, "rope_parameters", None) or {}
        if "mrope" in str(rope) or default.model_type.startswith("qwen"):  # positions of three kinds
            own["rope_parameters"] = {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                **rope,
                "mrope_section": [2, 3, 3],
            }
    return own | {"model_type": default.model_type}


def prompts() -> list[list[int]]:
    """Ragged prompts of text alone."""
    return [[token if token < IMAGE else 7 for token in row] for row in zoo.prompts(3, (9, 5, 14))]
