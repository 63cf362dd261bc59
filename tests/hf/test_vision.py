"""Text-only calls to vision-language models run on the engine; images are stock's, with their name as the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import vision
from stock import assert_same, caught, padded, same_tensor

import hf_paged

KWARGS: dict[str, Any] = dict(max_new_tokens=6, do_sample=False)
FAMILIES = """
    aya_vision gemma3 internvl llava llava_next llava_next_video llava_onevision mistral3 qwen2_5_vl qwen2_vl qwen3_vl
    qwen3_vl_moe smolvlm video_llama_3 video_llava vipllava
""".split()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family in vision.CLASS_NAMES])
def test_text_alone_is_carried(family: str) -> None:
    model = vision.build(family)
    assert hf_paged.explain(model).path == "flat"
    assert_same(model, **padded(vision.prompts()), **KWARGS)
    assert_same(model, **padded(vision.prompts()), max_new_tokens=4, do_sample=True, top_p=0.8)


def test_images_are_named_in_the_reason() -> None:
    """What the preparation makes of them is no sign of another release."""
    model = vision.build("llava")
    ids = torch.tensor([[5, 6, *[model.config.image_token_id] * 16, 7, 8]])
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = model.generate(input_ids=ids, pixel_values=pixels, **KWARGS)
    hf_paged.patch(model)
    with caught() as warned:
        same_tensor(model.generate(input_ids=ids, pixel_values=pixels, **KWARGS), expected)
        model.generate(**padded(vision.prompts()), **KWARGS)
    assert len(warned) == 1
    assert "pixel_values for the model's forward is not carried" in warned[0]
    assert "NOTHING" not in warned[0]
