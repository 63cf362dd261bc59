"""Deterministic mode: a request's results have the same bits whatever else is in its batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stock import build

import hf_paged
import zoo
from hf_paged import LLM, ConfigError, SamplingParams, UnsupportedModelError
from hf_paged.hf import invariant, verify
from hf_paged.hf.vectors import in_whole_vectors
from hf_paged_sdpa.kernels import TiledKernels

FAMILIES = ("llama", "qwen3", "gemma2", "gpt2")
LENGTHS = (3, 20, 60, 2, 41, 60)
TIGHT = dict(skip_tokenizer_init=True, deterministic=True, max_num_batched_tokens=24, num_blocks=10)
PARAMS = (
    SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=3),
    SamplingParams(temperature=0.9, top_p=0.9, seed=5, max_tokens=12, ignore_eos=True, logprobs=0),
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
    for params in PARAMS if family == "llama" else PARAMS[:1]:
        with LLM(build(family), **TIGHT) as llm:
            together = results(llm, prompts, params)
            assert llm.stats.num_preemptions > 0
        with LLM(build(family), **{**TIGHT, "max_num_batched_tokens": 512}) as llm:
            for _ in range(2):  # the second time from the prefix cache
                assert [results(llm, [prompt], params)[0] for prompt in prompts] == together


def test_generate_of_a_patched_model() -> None:
    model = zoo.build("llama")
    prompts = [torch.tensor([prompt]) for prompt in zoo.prompts(3, LENGTHS)]
    options = dict(max_new_tokens=12, do_sample=False, return_dict_in_generate=True, output_scores=True)
    with hf_paged.paged(model, deterministic=True, on_unsupported="error"):
        long = model.generate(torch.cat([prompts[2], prompts[5]]), **options)
        for row, prompt in enumerate((prompts[2], prompts[5])):
            alone = model.generate(prompt, **options)
            assert torch.equal(alone.sequences[0], long.sequences[row])
            for mine, theirs in zip(alone.scores, long.scores, strict=True):
                assert torch.equal(mine[0], theirs[row])


def test_kernels_that_are_not_invariant_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = TiledKernels.linear

    def linear(self: TiledKernels, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return real(self, x, *args, **kwargs) * (1 + 1e-6 * (len(x) > 16))

    monkeypatch.setattr(TiledKernels, "linear", linear)
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
            register("bare", lambda spec: Bare())

    class Bare:
        deterministic, prefer_runs, captures, sampling = True, False, False, None

    for name in ("plain", "bare"):  # one that doesn't say so, one without kernels
        with pytest.raises(ConfigError, match=f"'{name}' doesn't offer"):
            LLM(zoo.build("llama"), plugins=(Plugin(),), attention_backend=name, **TIGHT)


def test_two_engines_of_one_model_with_other_kernels() -> None:
    model = zoo.build("llama")
    with LLM(model, skip_tokenizer_init=True, num_blocks=20) as plain:
        assert plain.engine()[0].fusion is not None
        with pytest.raises(UnsupportedModelError, match="close that engine first"):
            LLM(model, **TIGHT)
        assert plain.engine()[0].fusion.users == 1
    with LLM(model, **TIGHT) as llm:
        assert llm.engine()[0].fusion is not None
        with LLM(model, skip_tokenizer_init=True, num_blocks=20) as plain:
            assert "close that engine first" in plain.engine()[0].unfused


def test_two_deterministic_engines_of_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither looks into the kernels of the fused layers that they share."""
    model, watched = zoo.build("llama"), []
    real = invariant.InvariantOps._product
    monkeypatch.setattr(invariant.InvariantOps, "_product", lambda *a: watched.append(1) or real(*a))
    with LLM(model, **TIGHT) as first, LLM(model, **TIGHT) as second:
        prompts = zoo.prompts(3, LENGTHS[:3])
        assert results(first, prompts, PARAMS[0]) == results(second, prompts, PARAMS[0])
    assert not watched


def test_the_proof_takes_products_of_few_and_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = set()
    real = TiledKernels.linear

    def linear(self: TiledKernels, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows.add(len(x))
        return real(self, x, *args, **kwargs)

    monkeypatch.setattr(TiledKernels, "linear", linear)
    LLM(zoo.build("llama"), **TIGHT).close()
    assert rows >= {1, 2, 9, 20}  # one tile, and more than one
    assert verify.LENGTHS[-1] > 64  # on a GPU: as many as large tiles take


def test_a_model_of_few_positions_is_proved_with_those(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "LENGTHS_ON_CPU", verify.LENGTHS)
    model = zoo.build("llama")
    model.config.max_position_embeddings = 40
    with LLM(model, **TIGHT) as llm:
        assert llm.generate([[5] * 12], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)[0].finished


@pytest.mark.parametrize("threads", [1, 3, 4])
def test_whatever_threads_share_the_elements(threads: int) -> None:
    """Where a thread's share ends, torch computes a gate's exp by other code, that rounds otherwise."""
    before = torch.get_num_threads()
    config = zoo.build("llama").config
    config.intermediate_size = 4096
    torch.manual_seed(0)
    model = type(zoo.build("llama"))(config).eval()
    prompts = zoo.prompts(5, (22,) * 8)
    scores = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=0, logprobs=0)
    try:
        torch.set_num_threads(threads)
        found = []
        for most in (9, 22, 176):
            with LLM(model, skip_tokenizer_init=True, deterministic=True, max_num_batched_tokens=most) as llm:
                outputs = llm.generate(prompts, scores, use_tqdm=False)
                found.append([[next(iter(e.values())).logprob for e in o.prompt_logprobs[1:]] for o in outputs])
        assert found[0] == found[1] == found[2]
    finally:
        torch.set_num_threads(before)


ELEMENTWISE = [torch.exp, torch.tanh, torch.sigmoid, torch.nn.functional.silu, torch.nn.functional.gelu, torch.cos]


@pytest.mark.parametrize("function", ELEMENTWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_in_whole_vectors(function: Any, dtype: torch.dtype) -> None:
    x = torch.randn(37, 1001).to(dtype)
    whole = in_whole_vectors(function, (x,))
    torch.testing.assert_close(whole, function(x))
    for first, last in ((0, 1), (3, 20), (36, 37)):
        assert torch.equal(in_whole_vectors(function, (x[first:last],)), whole[first:last])
    column = x[:, :1]
    assert torch.equal(in_whole_vectors(torch.add, (x, column)), x + column)
    inner = x.clone()
    assert in_whole_vectors(torch.ops.aten.tanh_.default, (inner,)) is inner
    assert torch.equal(inner, in_whole_vectors(torch.tanh, (x,)))


OVER_TOKENS = [
    lambda x: x.softmax(1),
    lambda x: x.mean(1),
    lambda x: x.abs().amax(),
    lambda x: x.sum(),
    lambda x: x.topk(2, dim=1)[0],
    lambda x: x.sort(1)[0],
    lambda x: x.cumsum(1),
    lambda x: torch.bmm(x, x.transpose(1, 2)),
]
ALONG_ROWS = [lambda x: x.softmax(-1), lambda x: x.amax(2), lambda x: x.topk(2)[0], lambda x: x.sort()[0], torch.relu]


@pytest.mark.parametrize("function", OVER_TOKENS)
def test_what_looks_at_other_tokens_is_refused(function: Any) -> None:
    with invariant.InvariantOps(TiledKernels()), pytest.raises(UnsupportedModelError, match=r"know that aten\."):
        function(torch.randn(1, 5, 8))


@pytest.mark.parametrize("function", ALONG_ROWS)
def test_what_looks_at_its_row_is_let_through(function: Any) -> None:
    x = torch.randn(1, 5, 8)
    with invariant.InvariantOps(TiledKernels()):
        got = function(x)
    assert torch.equal(got, function(x))
