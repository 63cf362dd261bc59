"""Deterministic mode: a request's results have the same bits whatever else is in its batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_paged
import zoo
from hf_paged import LLM, ConfigError, SamplingParams, UnsupportedModelError
from hf_paged.hf import verify
from hf_paged_sdpa.kernels import TiledKernels, TorchKernels

FAMILIES = ("llama", "qwen3", "gemma2", "phi3", "gpt2", "opt")
LENGTHS = (3, 9, 20, 60, 33, 2, 41, 17, 60, 25)
TIGHT = dict(skip_tokenizer_init=True, deterministic=True, max_num_batched_tokens=24, num_blocks=14)
PARAMS = (
    SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, logprobs=3),
    SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=20, ignore_eos=True, logprobs=0),
)


def results(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[Any]:
    """For each prompt its tokens, and each log-probability to the last bit."""
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        (
            out.token_ids,
            [{token: entry.logprob for token, entry in position.items()} for position in out.logprobs or ()],
        )
        for output in outputs
        for out in output.outputs
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_alone_or_in_a_batch_in_pieces_preempted_or_from_the_cache(family: str) -> None:
    prompts = zoo.prompts(3, LENGTHS)
    for params in PARAMS:
        with LLM(zoo.build(family), **TIGHT) as llm:
            together = results(llm, prompts, params)
            assert llm.stats.num_preemptions > 0
        with LLM(zoo.build(family), **{**TIGHT, "max_num_batched_tokens": 512}) as llm:
            for _ in range(2):  # the second time from the prefix cache
                assert [results(llm, [prompt], params)[0] for prompt in prompts] == together


def test_generate_of_a_patched_model() -> None:
    model = zoo.build("llama")
    prompts = [torch.tensor([prompt]) for prompt in zoo.prompts(3, LENGTHS)]
    options = dict(max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_scores=True)
    with hf_paged.paged(model, deterministic=True, on_unsupported="error"):
        long = model.generate(torch.cat([prompts[3], prompts[8]]), **options)
        for row, prompt in enumerate((prompts[3], prompts[8])):
            alone = model.generate(prompt, **options)
            assert torch.equal(alone.sequences[0], long.sequences[row])
            for mine, theirs in zip(alone.scores, long.scores, strict=True):
                assert torch.equal(mine[0], theirs[row])


def test_kernels_that_are_not_invariant_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("linear", "gated", "add_linear"):
        monkeypatch.setattr(TiledKernels, name, getattr(TorchKernels, name))
    with pytest.raises(UnsupportedModelError, match="alone and in a batch differ"):
        LLM(zoo.build("llama"), **TIGHT)


def test_an_operation_that_is_not_known_is_named() -> None:
    model = zoo.build("mixtral")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(UnsupportedModelError, match=r"deterministic=True doesn't know that aten\.\w+"):
        LLM(model, **TIGHT)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    prompt = torch.tensor([[5, 6, 7]])
    wanted = model.generate(prompt, max_new_tokens=4, do_sample=False)
    hf_paged.patch(model, deterministic=True)
    with pytest.warns(UserWarning, match="deterministic=True doesn't know"):
        assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), wanted)
    hf_paged.unpatch(model)


def test_a_backend_that_does_not_offer_it() -> None:
    class Plugin:
        @hf_paged.hookimpl
        def register_attention_backends(self, register: Any, config: Any) -> None:
            from hf_paged_sdpa.backend import SDPABackend

            register("plain", lambda spec: SDPABackend())

    with pytest.raises(ConfigError, match="'plain' doesn't offer"):
        LLM(zoo.build("llama"), plugins=(Plugin(),), attention_backend="plain", **TIGHT)


def test_two_engines_of_one_model_with_other_kernels() -> None:
    model = zoo.build("llama")
    with LLM(model, skip_tokenizer_init=True, num_blocks=20) as plain:
        assert plain.engine()[0].fusion is not None
        with LLM(model, **TIGHT) as llm:  # on a CPU the model's own norms will do
            assert "fused with other kernels" in llm.engine()[0].unfused
        assert plain.engine()[0].fusion.users == 1
    with LLM(model, **TIGHT) as llm:
        assert llm.engine()[0].fusion is not None


def test_the_proof_takes_products_of_few_and_of_many_rows() -> None:
    assert min(verify.ALONE) < 8
    assert max(verify.ALONE) > 64
