"""Fused layers: found by structure, verified, live, and gone without a trace."""

from __future__ import annotations

import copy
import gc
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from stock import Expected, build, caught, rows_of

import hf_paged
import zoo
from hf_paged.hf import adopt
from hf_paged.hf.fusion.merge import MergedLinear, is_plain
from hf_paged.hf.fusion.storage import holders
from hf_paged_sdpa.kernels import TorchKernels

KWARGS = dict(max_new_tokens=12, do_sample=False)
LENGTHS = (3, 9, 14, 20)
FUSED = dict(fusions=True, on_unsupported="error")
# Family, layers of its tiny model that are fused, and how many of them have a gated MLP.
FAMILIES = [
    ("llama", 2, 2),
    ("mistral", 2, 2),
    ("qwen2", 2, 2),
    ("qwen3", 2, 2),
    ("phi3", 2, 2),
    ("gemma2", 2, 2),
    ("gemma3_text", 2, 2),
    ("olmo2", 2, 2),
    ("granite", 2, 2),
    ("glm", 2, 2),
    ("glm4", 2, 2),
    ("smollm3", 2, 2),
    ("mixtral", 2, 0),
    ("gpt_oss", 2, 0),
]


def fusion_of(model):
    (built, _) = hf_paged.hf.handle.patched(model).engine()
    return built.fusion


def merged_of(model):
    attention = model.model.layers[0].self_attn
    return attention.q_proj, attention.k_proj, attention.v_proj


def are_merged(model):
    return len({layer.weight.untyped_storage().data_ptr() for layer in merged_of(model)}) == 1


def fused_layers(report):
    (line,) = [line for line in report if "layers fused" in line]
    return int(line.split()[0]), int(line.split("; ")[1].split()[0])


@pytest.mark.parametrize(("family", "layers", "gated"), [f for f in FAMILIES if f[0] in zoo.FAMILIES])
def test_families_are_fused_and_give_stocks_tokens(family, layers, gated):
    model = build(family)
    wanted = Expected(model, zoo.prompts(3, LENGTHS), **KWARGS)
    with caught() as warned, hf_paged.paged(model, max_num_batched_tokens=12, **FUSED):
        output = model.generate(**wanted.batch, **KWARGS)
        assert rows_of(output, wanted.width) == wanted.of(output)
        assert fused_layers(fusion_of(model).report()) == (layers, gated)
    assert not warned


@pytest.mark.parametrize("family", ["gpt2", "olmo", "cohere", "deepseek_v3"])
def test_what_has_another_structure_runs_as_it_is(family):
    """Their norms, products or wiring are not those that are known: only the parts that are get fused."""
    model = build(family)
    wanted = Expected(model, zoo.prompts(3, LENGTHS), **KWARGS)
    with hf_paged.paged(model, **FUSED):
        output = model.generate(**wanted.batch, **KWARGS)
        assert rows_of(output, wanted.width) == wanted.of(output)
        assert not any("layers fused" in line for line in fusion_of(model).report())


def test_a_layer_that_computes_something_else_is_taken_back():
    """Its parts have the usual names; what it does with them hasn't."""
    model = zoo.build("llama")
    layer = model.model.layers[1]
    norm = layer.post_attention_layernorm

    class Other(type(layer)):
        def forward(self, hidden_states, **kwargs):
            return super().forward(hidden_states, **kwargs) + 0.5 * norm(hidden_states)

    layer.__class__ = Other
    wanted = Expected(model, zoo.prompts(3, LENGTHS), **KWARGS)
    with hf_paged.paged(model, **FUSED):
        output = model.generate(**wanted.batch, **KWARGS)
        assert rows_of(output, wanted.width) == wanted.of(output)
        report = list(fusion_of(model).report())
        assert fused_layers(report) == (1, 1)
        assert any(line.startswith("1 layers run as they are: fused, it gives another output") for line in report)


def test_a_layer_that_depends_on_far_positions_is_taken_back():
    """As long as a text is short, it computes what the others do."""
    model = zoo.build("llama")
    layer = model.model.layers[0]

    class Scaled(type(layer)):
        def forward(self, hidden_states, position_ids=None, **kwargs):
            output = super().forward(hidden_states, position_ids=position_ids, **kwargs)
            return output * (1 + (position_ids // 64)[..., None].to(output.dtype))

    layer.__class__ = Scaled
    prompt = torch.randint(5, 60, (1, 100))
    wanted = model.generate(prompt, **KWARGS)
    with hf_paged.paged(model, **FUSED):
        assert torch.equal(model.generate(prompt, **KWARGS), wanted)
        assert fused_layers(fusion_of(model).report()) == (1, 1)
        assert any("depends on positions" in line for line in fusion_of(model).report())


def test_a_call_in_inference_mode_leaves_the_model_fit_for_training():
    model = zoo.build("llama")
    ids = torch.randint(5, 60, (2, 16))
    with hf_paged.paged(model, **FUSED), torch.inference_mode():
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model(input_ids=ids, labels=ids).loss.backward()


def test_a_forward_that_was_wrapped_meanwhile_stays():
    model = zoo.build("llama")
    layer = model.model.layers[0]
    calls = []
    prompt = torch.tensor([[5, 6, 7]])
    with hf_paged.paged(model, **FUSED):
        wanted = model.generate(prompt, **KWARGS)
        inner = layer.forward

        def wrapped(*args, **kwargs):
            calls.append(1)
            return inner(*args, **kwargs)

        layer.forward = wrapped
        assert torch.equal(model.generate(prompt, **KWARGS), wanted)
    assert layer.forward is wrapped
    calls.clear()
    assert torch.equal(model.generate(prompt, **KWARGS), wanted)
    assert calls


def test_an_llm_that_nobody_closed_takes_its_fusion_along():
    model = zoo.build("llama")
    own = [layer.weight.data_ptr() for layer in merged_of(model)]
    llm = hf_paged.LLM(model, skip_tokenizer_init=True, fusions=True)
    assert are_merged(model)
    del llm
    gc.collect()
    assert not are_merged(model)
    assert len({layer.weight.untyped_storage().data_ptr() for layer in merged_of(model)}) == len(own)


def test_unpatching_leaves_no_trace():
    model = zoo.build("qwen3")
    names = dict(model.named_modules())
    before = {name: dict(vars(module)) for name, module in names.items()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    hf_paged.patch(model, **FUSED)
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
    assert are_merged(model)
    for name, module in names.items():  # not even while it is patched, but for the line that patches
        assert vars(module).keys() - {"generate"} == before[name].keys()
    hf_paged.unpatch(model)
    for name, module in names.items():
        assert vars(module) == before[name] or vars(module).keys() == before[name].keys()
    storages = [parameter.untyped_storage().data_ptr() for parameter in model.parameters()]
    assert len(set(storages)) == len(storages)
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name])


def test_the_weights_are_live():
    """An optimiser's step, a parameter's new storage, and a loaded state reach the merged products."""
    model = zoo.build("llama")
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.randint(5, 60, (2, 16))

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    def move():
        for weight in (model.model.layers[0].self_attn.k_proj.weight, model.model.layers[1].input_layernorm.weight):
            weight.data = torch.randn_like(weight)

    def assign():
        model.load_state_dict({name: 0.9 * value for name, value in model.state_dict().items()}, assign=True)

    def load():
        state = {name: value + 0.1 * torch.randn_like(value) for name, value in model.state_dict().items()}
        model.load_state_dict(state)

    with hf_paged.paged(model, **FUSED):
        for change in (step, move, load, assign):
            model.generate(prompt, **KWARGS)
            change()
            got = model.generate(prompt, **KWARGS)
            assert torch.equal(got, hf_paged.hf.handle.patched(model).stock(prompt, **KWARGS))
            assert fused_layers(fusion_of(model).report()) == (2, 2)


def test_training_goes_past_the_fused_forwards():
    model = zoo.build("llama")
    ids = torch.randint(5, 60, (2, 16))
    plain = model(input_ids=ids, labels=ids).loss
    with hf_paged.paged(model, **FUSED):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    assert torch.equal(loss, plain)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_adapter_takes_effect_between_two_calls():
    model = zoo.build("llama")
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    with hf_paged.paged(model, **FUSED) as handle:
        plain = model.generate(prompt, **KWARGS)
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        with_adapter = model.generate(prompt, **KWARGS)
        assert torch.equal(with_adapter, handle.stock(prompt, **KWARGS))
        assert not torch.equal(with_adapter, plain)
        with adapted.disable_adapter():
            assert torch.equal(model.generate(prompt, **KWARGS), plain)


def test_two_engines_of_one_model_share_its_fusion():
    model = zoo.build("llama")
    first = hf_paged.LLM(model, skip_tokenizer_init=True, fusions=True)
    with hf_paged.paged(model, **FUSED):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2)
        first.close()
        assert are_merged(model)
    assert not are_merged(model)


def test_of_two_engines_that_begin_at_once_one_tries_what_is_fused(monkeypatch):
    """The other waits, and takes over what was found: it neither tries again nor serves what nobody tried."""
    model, tried, ready = zoo.build("llama"), [], threading.Barrier(2)
    original = adopt.try_fusion

    def slow(*args):
        tried.append(threading.get_ident())
        time.sleep(0.5)  # the other one is there by now
        original(*args)

    def begin():
        ready.wait(60)
        return hf_paged.LLM(model, skip_tokenizer_init=True, fusions=True)

    monkeypatch.setattr(adopt, "try_fusion", slow)
    with ThreadPoolExecutor(2) as pool:
        engines = [one.result(120) for one in [pool.submit(begin), pool.submit(begin)]]
    assert len(tried) == 1
    prompts = [[5, 6, 7]]
    first, second = (engine.generate(prompts, use_tqdm=False)[0].outputs[0].token_ids for engine in engines)
    assert first == second
    for engine in engines:
        engine.close()
    assert not are_merged(model)


def test_a_copy_of_a_fused_model_is_plain():
    model = zoo.build("llama")
    with hf_paged.paged(model, **FUSED):
        wanted = model.generate(torch.tensor([[5, 6, 7]]), **KWARGS)
        twin = copy.deepcopy(model)
    assert torch.equal(twin.generate(torch.tensor([[5, 6, 7]]), **KWARGS), wanted)
    layer = twin.model.layers[0]
    assert isinstance(layer.forward, types.MethodType)
    assert layer.forward.__self__ is layer


def test_explain_lists_what_is_fused():
    model = zoo.build("llama")
    text = str(hf_paged.explain(model, hf_paged.PagedConfig(fusions=True)))
    assert "2 layers fused" in text
    assert "not fused: fusions=False" in str(hf_paged.explain(model, hf_paged.PagedConfig(fusions=True), fusions=False))
    with pytest.raises(hf_paged.ConfigError, match="fusion'"):
        hf_paged.explain(model, fusion=False)


@pytest.mark.parametrize("call", [hf_paged.patch, hf_paged.explain, hf_paged.LLM])
def test_options_that_are_no_config_are_refused(call):
    with pytest.raises(hf_paged.ConfigError, match="config must be a PagedConfig, got {'block_size': 32}; single"):
        call(zoo.build("llama"), config={"block_size": 32})
    with pytest.raises(hf_paged.ConfigError, match="disable_plugins must be a tuple, got 'hf_paged_sdpa'"):
        call(zoo.build("llama"), disable_plugins="hf_paged_sdpa")


def test_merged_weights():
    layers = [torch.nn.Linear(4, n) for n in (3, 5)]
    values = [layer.weight.detach().clone() for layer in layers]
    merged = MergedLinear(layers)
    assert merged.intact
    x = torch.randn(2, 4)
    wanted = torch.cat([layer(x) for layer in layers], -1)
    torch.testing.assert_close(torch.nn.functional.linear(x, merged.weight, merged.bias), wanted)
    with torch.no_grad():
        layers[1].weight.mul_(2)
    assert torch.equal(merged.weight[3:], 2 * values[1])
    layers[0].weight.data = torch.zeros(3, 4)
    assert not merged.intact
    merged.bind()
    assert merged.intact
    assert not merged.weight[:3].any()
    merged.restore()
    assert not merged.intact
    assert torch.equal(layers[1].weight, 2 * values[1])


def test_only_plain_layers_are_merged():
    plain, hooked, tied = (torch.nn.Linear(4, 4) for _ in range(3))
    hooked.register_forward_hook(lambda *args: None)
    twin = torch.nn.Linear(4, 4)
    twin.weight = tied.weight
    parametrised = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4))
    model = torch.nn.ModuleList([plain, hooked, tied, twin, parametrised])
    shared = holders(model)
    assert [is_plain(module, shared) for module in model] == [True, False, False, False, False]


def test_the_last_layer_finishes_only_tokens_whose_logits_are_wanted(monkeypatch):
    """Of the others it makes keys and values; of a chunk in the midst of a prompt, those alone."""
    model = zoo.build("llama")
    prompt = torch.tensor(zoo.prompts(1, (20,)))
    rows, gated = [], TorchKernels.gated
    with hf_paged.paged(model, max_num_batched_tokens=12, keep_pool=True, **FUSED):
        wanted = hf_paged.hf.handle.patched(model).stock(prompt, **KWARGS)
        model.generate(prompt.flip(1), **KWARGS)  # trials are over
        monkeypatch.setattr(TorchKernels, "gated", lambda self, x, *args: rows.append(len(x)) or gated(self, x, *args))
        assert torch.equal(model.generate(prompt, **KWARGS), wanted)
    assert rows == [12, 8, 1, *[1, 1] * 11]


def test_who_watches_the_model_sees_every_token():
    """A hook behind the last layer gets what stock's gives it, also of tokens whose logits nobody wants."""
    model = zoo.build("llama")
    prompt = torch.tensor(zoo.prompts(1, (9,)))
    seen = []
    model.model.norm.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    model.generate(prompt, max_new_tokens=1)
    with hf_paged.paged(model, **FUSED):
        model.generate(prompt, max_new_tokens=1)
        assert fused_layers(fusion_of(model).report()) == (2, 2)
    torch.testing.assert_close(seen[-1], seen[0], rtol=1e-4, atol=1e-4)
