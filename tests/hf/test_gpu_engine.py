"""The engine on a GPU: CUDA graphs, fused layers and steps ahead change nothing but the speed."""

from __future__ import annotations

import pytest
import torch
from stock import Expected, build, rows_of

import hf_paged
import zoo
from hf_paged import LLM, SamplingParams
from hf_paged.engine.logprobs import top_logprobs
from hf_paged.hf.handle import patched

pytestmark = pytest.mark.gpu

FAMILIES = ("llama", "qwen3", "phi3", "gemma2", "gemma3_text", "olmo2", "granite", "mixtral", "gpt_oss", "smollm3")
EXPERTS = ("mixtral", "gpt_oss")
LENGTHS = (3, 9, 14, 20, 6, 26, 11, 17)
SMALL = dict(skip_tokenizer_init=True, max_model_len=512, kv_memory=1 << 26)
GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
KWARGS = dict(max_new_tokens=24, do_sample=False)


def tokens(llm, prompts, params=GREEDY):
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]


def graphs_of(llm):
    return llm.engine()[1].engine.runner._graphs


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_and_fusions_change_no_token(family):
    model = build(family).cuda()
    prompts = zoo.prompts(3, LENGTHS)
    with LLM(model, fusions=False, enforce_eager=True, **SMALL) as llm:
        plain = tokens(llm, prompts)
    with LLM(model, **SMALL) as llm:
        assert tokens(llm, prompts) == plain
        # In fp32 stock's experts ask the host how many tokens each has: no graph can hold that.
        assert graphs_of(llm)._failed == (family in EXPERTS)
        assert bool(graphs_of(llm)._graphs) == (family not in EXPERTS)
        assert any("layers fused" in line for line in llm.engine()[0].fusion.report())


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_in_half_precision_are_captured(family):
    model = build(family).bfloat16().cuda()
    with LLM(model, **SMALL) as llm:
        tokens(llm, zoo.prompts(3, LENGTHS))
        assert graphs_of(llm)._graphs
        assert not graphs_of(llm)._failed


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_stocks_tokens_with_graphs(family):
    model = build(family).cuda()
    wanted = Expected(model, zoo.prompts(3, LENGTHS), **KWARGS)
    with hf_paged.paged(model, on_unsupported="error", keep_pool=True):
        for _ in range(2):
            output = model.generate(**wanted.batch, **KWARGS)
            assert rows_of(output, wanted.width) == wanted.of(output)


def test_all_graphs_at_once():
    model = build("llama").cuda()
    prompts = zoo.prompts(3, LENGTHS)
    with LLM(model, enforce_eager=True, **SMALL) as llm:
        plain = tokens(llm, prompts)
    with LLM(model, max_num_seqs=32, **SMALL) as llm:
        llm.warm_up()
        captured = dict(graphs_of(llm)._graphs)
        assert tokens(llm, prompts) == plain
        assert graphs_of(llm)._graphs == captured  # none was dropped, none was missing


def test_seeded_draws_do_not_depend_on_the_batch():
    model = build("llama").cuda()
    prompts = zoo.prompts(3, LENGTHS)
    params = [
        SamplingParams(temperature=0.9, top_p=0.9, top_k=20, seed=i, max_tokens=20, ignore_eos=True) for i in range(8)
    ]
    with LLM(model, **SMALL) as llm:
        together = tokens(llm, prompts, params)
        alone = [tokens(llm, [prompt], own)[0] for prompt, own in zip(prompts, params, strict=True)]
    assert together == alone


def test_what_needs_the_host_runs_beside_what_does_not():
    """Penalties and log-probabilities wait for the host, plain requests run ahead: each as if it were alone."""
    model = build("llama").cuda()
    prompts = zoo.prompts(3, LENGTHS)
    kinds = [{}, {"repetition_penalty": 1.3}, {"logprobs": 2}, {"min_tokens": 3, "frequency_penalty": 0.5}]
    params = [GREEDY.replace(**kinds[i % 4]) for i in range(8)]
    with LLM(model, fusions=False, enforce_eager=True, **SMALL) as llm:
        alone = [tokens(llm, [prompt], own)[0] for prompt, own in zip(prompts, params, strict=True)]
    with LLM(model, **SMALL) as llm:
        assert tokens(llm, prompts, params) == alone


def test_training_steps_between_calls():
    model = build("llama").cuda()
    prompt = torch.tensor([[5, 6, 7, 8, 9]], device="cuda")
    ids = torch.randint(5, 60, (2, 16), device="cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with hf_paged.paged(model, on_unsupported="error", keep_pool=True):
        for _ in range(3):
            got = model.generate(prompt, **KWARGS)
            assert torch.equal(got, patched(model).stock(prompt, **KWARGS))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def test_moved_weights_void_the_graphs():
    model = build("llama").cuda()
    prompt = torch.tensor([[5, 6, 7, 8, 9]], device="cuda")
    with hf_paged.paged(model, on_unsupported="error", keep_pool=True):
        model.generate(prompt, **KWARGS)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone() * 1.1
        assert torch.equal(model.generate(prompt, **KWARGS), patched(model).stock(prompt, **KWARGS))


def test_an_adapter_takes_effect():
    peft = pytest.importorskip("peft")
    model = build("llama").cuda()
    prompt = torch.tensor([[5, 6, 7, 8, 9]], device="cuda")
    with hf_paged.paged(model, on_unsupported="error", keep_pool=True):
        plain = model.generate(prompt, **KWARGS)
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        )
        assert torch.equal(model.generate(prompt, **KWARGS), patched(model).stock(prompt, **KWARGS))
        with adapted.disable_adapter():
            assert torch.equal(model.generate(prompt, **KWARGS), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_deterministic_results_do_not_depend_on_the_batch(family, dtype):
    model = build(family).to(dtype).cuda()
    prompts = zoo.prompts(3, [3, 90, 14, 20, 6, 26, 150, 17] * 10)
    params = [
        SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=2),
        SamplingParams(temperature=0.8, top_p=0.9, seed=4, max_tokens=24, ignore_eos=True, logprobs=0),
    ]
    params = (params * len(prompts))[: len(prompts)]  # by turns

    def results(llm, prompts, params):
        outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
        return [(out.token_ids, [{t: e.logprob for t, e in at.items()} for at in out.logprobs]) for out in outputs]

    with LLM(model, deterministic=True, max_num_batched_tokens=128, **SMALL) as llm:
        together = results(llm, prompts, params)
        assert graphs_of(llm)._graphs
    with LLM(model, deterministic=True, enforce_eager=True, **SMALL) as llm:
        assert [results(llm, [p], [s])[0] for p, s in zip(prompts[:8], params[:8], strict=True)] == together[:8]
        assert results(llm, prompts[:8], params[:8]) == together[:8]  # from the prefix cache


def test_log_probabilities_do_not_depend_on_where_a_row_lies():
    logits = torch.randn(9, 50257, device="cuda")  # an odd number: rows begin anywhere
    for row in logits:
        assert top_logprobs(row, 5, 3) == top_logprobs(row.clone(), 5, 3)


def test_memory_is_given_back():
    model = build("llama").cuda()
    for _ in range(2):  # the first one leaves cuBLAS its workspaces
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with LLM(model, **SMALL) as llm:
            tokens(llm, zoo.prompts(3, LENGTHS))
    assert torch.cuda.memory_allocated() <= before + (1 << 20)
