"""Every decoder family of Transformers: the same tokens as stock on the engine, or stock itself with a reason."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version
from stock import OLD, RELEASE, Expected, build, caught, free, padded, rows_of

import hf_paged
import zoo

NEW_TOKENS = 24
LENGTHS = (3, 9, 14, 20, 6, 26, 11, 17)

# FAMILIES.md of the design: 'same at once'.
CARRIED = """
    apertus arcee aria_text axk1 beam biogpt bitnet cohere cohere2 cohere2_moe cohere_compass_text ctrl cwm dbrx
    deepseek_v2 deepseek_v3 diffllama dots1 emu3 ernie4_5 ernie4_5_moe flex_olmo flint gemma gemma2 gemma3_text
    gemma3n_text gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox
    gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense
    hunyuan_v1_moe hy_v3 hyperclovax jais2 jetmoe laguna llama longcat_flash mellum mimo_v2_flash minicpm3
    minimax_m2 ministral ministral3 mistral mixtral mllama modernbert-decoder moshi nanochat olmo olmo2 olmo3
    olmoe opt persimmon phi phi3 phi4_multimodal qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open
    starcoder2 vaultgemma whisper youtu
""".split()
# It lists these for closer looks; they work.
CARRIED_TOO = "afmoe exaone4 exaone_moe kolibri1 nemotron phimoe stablelm".split()
# They came, or got the attention interface, with Transformers 5.24.
CARRIED_SINCE_5_24 = "apertus1p5_text codegen dory exaone gptj sarvam_mla sarvam_moe".split()

KNOWN = {*CARRIED, *CARRIED_TOO, *(CARRIED_SINCE_5_24 if Version("5.24") <= RELEASE else ())}
HERE = [family for family in zoo.FAMILIES if family in KNOWN]
OTHERS = [family for family in zoo.FAMILIES if family not in KNOWN]


@pytest.mark.parametrize("family", HERE)
def test_same_tokens(family: str) -> None:
    """Ragged and left-padded, in small chunks and out of blocks; then with the prefixes of before."""
    model = build(family)
    kwargs = dict(max_new_tokens=NEW_TOKENS, do_sample=False)
    wanted = Expected(model, zoo.prompts(3, LENGTHS), **kwargs)
    batch, width = wanted.batch, wanted.width
    # The longest row takes 13 blocks, all together 60 and more; most prompts need several steps of 12 tokens.
    tight = dict(block_size=4, num_blocks=24, max_num_batched_tokens=12)
    with caught() as warned, hf_paged.paged(model, on_unsupported="error", **tight) as handle:
        output = model.generate(**batch, **kwargs)
        assert rows_of(output, width) == wanted.of(output)
        assert handle.stats.num_preemptions > 0 or max(map(len, wanted.rows)) < NEW_TOKENS
        few = padded([wanted.prompts[5], wanted.prompts[7]])
        for _ in range(2):
            hits = handle.stats.prefix_hits
            again = rows_of(model.generate(**few, **{**kwargs, "max_new_tokens": 4}), width)
            assert again == [wanted.rows[5][:4], wanted.rows[7][:4]]
        assert handle.stats.prefix_hits > hits
        assert free(handle.stats)
    assert handle.stats.pool_bytes == 0
    assert not warned


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3", "gpt2", "mixtral"])
def test_same_tokens_with_room(family: str) -> None:
    """As a user has it: no option given."""
    model = build(family)
    kwargs = dict(max_new_tokens=NEW_TOKENS, do_sample=False)
    wanted = Expected(model, zoo.prompts(3, LENGTHS), **kwargs)
    handle = hf_paged.patch(model, on_unsupported="error")
    output = model.generate(**wanted.batch, **kwargs)
    assert rows_of(output, wanted.width) == wanted.of(output)
    assert handle is not None
    assert handle.stats.num_preemptions == 0


@pytest.mark.parametrize("family", ["moshi", "mllama", "llama"])
def test_sampled_tokens(family: str) -> None:
    """A family may read more ids than it writes: its logits have fewer columns than its embeddings rows."""
    if family not in HERE:
        pytest.skip(f"{family} is not carried on this Transformers")
    model = build(family)
    batch = padded(zoo.prompts(3, (9, 9)))
    kwargs = {"max_new_tokens": 6, "do_sample": True, "eos_token_id": None}
    torch.manual_seed(5)
    wanted = model.generate(**batch, **kwargs)
    hf_paged.patch(model, on_unsupported="error")
    torch.manual_seed(5)
    assert model.generate(**batch, **kwargs).tolist() == wanted.tolist()


@pytest.mark.parametrize("family", OTHERS)
def test_others_fall_back(family: str) -> None:
    model = build(family)
    batch = padded(zoo.prompts(3, (5, 9)))
    kwargs = dict(max_new_tokens=4, do_sample=False)
    wanted = model.generate(**batch, **kwargs)
    explanation = hf_paged.explain(model)
    assert explanation.path == "stock"
    assert explanation.reason
    assert explanation.reason in str(explanation)
    hf_paged.patch(model)
    with caught() as warned:
        got = model.generate(**batch, **kwargs)
        model.generate(**batch, **kwargs)
    assert got.tolist() == wanted.tolist()
    assert len(warned) == 1
    assert explanation.reason in warned[0]
    hf_paged.unpatch(model)


def test_every_family_is_in_one_list() -> None:
    assert len(CARRIED) == 85
    assert not set(HERE) & set(OTHERS)
    if not OLD:
        assert set(CARRIED) <= set(zoo.FAMILIES)


def test_explain_says_what_is_kept() -> None:
    explanation = hf_paged.explain(zoo.build("gemma3_text"))
    assert explanation.path == "flat"
    assert explanation.reason is None
    assert not explanation.patched
    text = str(explanation)
    assert "sdpa" in text
    assert "sliding window of 8 tokens" in text
    assert "full attention" in text
