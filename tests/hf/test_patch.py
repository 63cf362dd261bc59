"""Putting the patch on and taking it off leaves no trace, whatever happens between."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import sys
import threading
import time
import warnings
import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from stock import caught, padded, same_tensor, snapshot
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import GenerationMixin, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_paged
import zoo
from hf_paged.hf import build
from hf_paged.hf.patch import patched

BATCH = padded(zoo.prompts(2, (11, 4, 17)))
KWARGS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}


def hits(handle: Any) -> int:
    return handle.stats.prefix_queries


# ------------------------------------------------------------------------------------------------------ without a trace


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "mamba", "bart"])
def test_vars_are_as_before(family: str) -> None:
    model = zoo.build(family)
    before = snapshot(model)
    hf_paged.patch(model, on_unsupported="silent")
    assert vars(model)["generate"] is model.generate
    model.generate(**BATCH, **KWARGS)
    model.generate(**BATCH, **KWARGS, num_beams=2)
    with pytest.raises(ValueError):
        model.generate(**BATCH, **KWARGS, foo=1)
    hf_paged.unpatch(model)
    assert snapshot(model) == before
    assert "generate" not in vars(model)


def test_vars_are_as_before_after_an_exception(llama: PreTrainedModel) -> None:
    before = snapshot(llama)
    hf_paged.patch(llama)
    handle = llama.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with warnings.catch_warnings(), pytest.raises(ZeroDivisionError):
        warnings.simplefilter("ignore")
        llama.generate(**BATCH, **KWARGS)
    handle.remove()
    hf_paged.unpatch(llama)
    assert snapshot(llama) == before


def test_registries_are_ours_only_while_something_is_patched(llama: PreTrainedModel) -> None:
    other = zoo.build("llama")
    for model in (llama, other):
        hf_paged.patch(model)
    hf_paged.unpatch(llama)
    assert "hf_paged" in ALL_ATTENTION_FUNCTIONS
    hf_paged.unpatch(other)
    assert "hf_paged" not in ALL_ATTENTION_FUNCTIONS
    hf_paged.explain(llama)
    assert "hf_paged" not in ALL_ATTENTION_FUNCTIONS


def test_patched_generate_looks_like_stocks(llama: PreTrainedModel) -> None:
    def looks() -> tuple[Any, ...]:
        return inspect.signature(llama.generate), llama.generate.__doc__, llama.generate.__name__

    stock = looks()
    hf_paged.patch(llama)
    assert looks() == stock


# ----------------------------------------------------------------------------------------------------------- on and off


def test_twice_is_once(llama: PreTrainedModel) -> None:
    handle = hf_paged.patch(llama, block_size=8)
    assert hf_paged.patch(llama) is handle
    assert hf_paged.patch(llama, block_size=8) is handle
    with pytest.raises(hf_paged.ConfigError, match="unpatch"):
        hf_paged.patch(llama, block_size=4)
    hf_paged.unpatch(llama)
    assert "generate" not in vars(llama)
    hf_paged.unpatch(llama)
    assert hf_paged.patch(llama, block_size=4) is not handle


def test_paged_nests(llama: PreTrainedModel) -> None:
    before = snapshot(llama)
    with hf_paged.paged(llama, block_size=8) as outer:
        with hf_paged.paged(llama) as inner:
            assert inner is outer
        llama.generate(**BATCH, **KWARGS)
        assert outer.stats.pool_bytes > 0
        with pytest.raises(hf_paged.ConfigError), hf_paged.paged(llama, block_size=4):
            pass
        assert outer.stats.pool_bytes > 0
    assert snapshot(llama) == before
    hf_paged.patch(llama)
    with hf_paged.paged(llama):
        pass
    assert "generate" in vars(llama)  # it was patched before
    with hf_paged.paged(llama):
        hf_paged.patch(llama)
    hf_paged.unpatch(llama)
    with hf_paged.paged(llama, keep_pool=True):
        hf_paged.patch(llama)  # from now on it is patched for good
    assert "generate" in vars(llama)
    hf_paged.unpatch(llama)
    with hf_paged.paged(llama, keep_pool=True):
        pass
    assert "generate" not in vars(llama)
    with pytest.raises(ZeroDivisionError), hf_paged.paged(llama):
        raise ZeroDivisionError
    assert "generate" not in vars(llama)


def test_paged_from_two_threads(llama: PreTrainedModel) -> None:
    """The first one in leaves first; the other one is still paged."""
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with hf_paged.paged(llama):
            inside.set()
            leave.wait(60)

    first = hf_paged.paged(llama)
    first.__enter__()
    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    assert inside.wait(60)
    first.__exit__(None, None, None)
    assert "generate" in vars(llama)
    leave.set()
    thread.join(60)
    assert "generate" not in vars(llama)


def test_a_reference_to_the_method_outlives_unpatch(llama: PreTrainedModel) -> None:
    expected = llama.generate(**BATCH, **KWARGS)
    hf_paged.patch(llama)
    method = llama.generate
    hf_paged.unpatch(llama)
    with caught() as warned:
        same_tensor(method(**BATCH, **KWARGS), expected)
    assert not warned


@pytest.mark.parametrize("thing", [None.__class__, object(), "llama", nn.Linear(2, 2), zoo.build, LlamaForCausalLM])
def test_a_non_model(thing: Any) -> None:
    with pytest.raises(hf_paged.UnsupportedModelError, match=type(thing).__name__):
        hf_paged.patch(thing)
    with pytest.raises(hf_paged.UnsupportedModelError), hf_paged.paged(thing):
        pass
    with pytest.raises(hf_paged.UnsupportedModelError):
        hf_paged.explain(thing)


def test_unpatch_while_calls_run(llama: PreTrainedModel) -> None:
    """They end, with stock's answer or an error that says so; nothing hangs, nothing stays."""
    before = snapshot(llama)
    expected = llama.generate(**BATCH, max_new_tokens=60, do_sample=False)
    hf_paged.patch(llama, on_unsupported="silent")
    outcomes: list[Any] = []

    def call() -> None:
        try:
            outcomes.append(llama.generate(**BATCH, max_new_tokens=60, do_sample=False))
        except hf_paged.HFPagedError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=call, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.15)
    hf_paged.unpatch(llama)
    for thread in threads:
        thread.join(60)
    assert len(outcomes) == 6
    for outcome in outcomes:
        if isinstance(outcome, torch.Tensor):
            same_tensor(outcome, expected)
        else:
            assert isinstance(outcome, (hf_paged.RequestAbortedError, hf_paged.EngineClosedError))
    assert snapshot(llama) == before


def test_unpatch_in_the_middle_of_a_forward(llama: PreTrainedModel) -> None:
    """It waits for the forward, which finds what it needs to its end; the call gets stock's answer."""
    threads: list[threading.Thread] = []
    armed = False

    def unpatch(*_: Any) -> None:
        if armed and not threads:
            threads.append(threading.Thread(target=hf_paged.unpatch, args=(llama,), daemon=True))
            threads[0].start()
            threads[0].join(0.3)
            assert threads[0].is_alive()
            assert "generate" in vars(llama)

    expected = llama.generate(BATCH["input_ids"][2:], **KWARGS)
    hook = llama.model.layers[1].register_forward_pre_hook(unpatch)
    before = snapshot(llama)
    hf_paged.patch(llama, on_unsupported="error")
    llama.generate(**BATCH, max_new_tokens=1)
    armed = True
    # One row: a step that fails isn't tried again with fewer.
    same_tensor(llama.generate(BATCH["input_ids"][2:], **KWARGS), expected)
    threads[0].join(60)
    assert not threads[0].is_alive()
    assert snapshot(llama) == before
    hook.remove()


def test_unpatch_from_a_callback(llama: PreTrainedModel) -> None:
    """Nobody waits for itself."""
    before = snapshot(llama)
    hf_paged.patch(llama)

    def unpatch(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        hf_paged.unpatch(llama)
        return scores

    with pytest.raises(hf_paged.RequestAbortedError):
        llama.generate(**BATCH, **KWARGS, logits_processor=[unpatch])
    assert snapshot(llama) == before


def test_a_model_that_is_gone_leaves_nothing() -> None:
    model = zoo.build("llama")
    hf_paged.patch(model)
    model.generate(**BATCH, **KWARGS)
    gone = weakref.ref(model)
    assert "hf_paged" in ALL_ATTENTION_FUNCTIONS
    del model
    gc.collect()
    assert gone() is None
    assert "hf_paged" not in ALL_ATTENTION_FUNCTIONS


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_not_patched(llama: PreTrainedModel, how: Any) -> None:
    expected = llama.generate(**BATCH, **KWARGS)
    handle = hf_paged.patch(llama)
    twin = how(llama)
    same_tensor(twin.generate(**BATCH, **KWARGS), expected)
    assert hits(handle) == 0
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.neg_()
    different = twin.generate(**BATCH, **KWARGS)
    assert different.tolist() != expected.tolist()
    same_tensor(llama.generate(**BATCH, **KWARGS), expected)
    second = hf_paged.patch(twin, on_unsupported="error")
    same_tensor(twin.generate(**BATCH, **KWARGS), different)
    assert hits(second) > 0
    hf_paged.unpatch(twin)
    hf_paged.unpatch(llama)
    same_tensor(twin.generate(**BATCH, **KWARGS), different)


# -------------------------------------------------------------------------------------------------------------- explain


@pytest.mark.parametrize("already", [False, True])
def test_explain_says_what_patch_would_do(llama: PreTrainedModel, already: bool) -> None:
    own = own_model()
    assert "Own has a generate() of its own" in str(hf_paged.explain(own).reason)

    seen: list[str] = []

    class Plugin:
        @hf_paged.hookimpl
        def prepare_model(self, model: Any, ledger: Any) -> None:
            ledger.set_attribute(model.model.layers[0].mlp, "forward", lambda x: x * 1j)
            seen.append("prepared")

        @hf_paged.hookimpl
        def engine_stopped(self, error: Any) -> None:
            seen.append("stopped")

    if already:
        hf_paged.patch(llama)
    before = snapshot(llama)
    explained = hf_paged.explain(llama, hf_paged.PagedConfig(plugins=(Plugin(),)))
    assert explained.path == "stock"
    assert explained.patched == already
    assert seen == ["prepared"]
    assert snapshot(llama) == before
    assert hf_paged.explain(llama).path == "flat"


def test_an_engine_that_plugins_refuse_is_closed(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Plugin:
        @hf_paged.hookimpl
        def engine_started(self) -> None:
            raise ValueError("no")

    closed: list[Any] = []
    monkeypatch.setattr(build.Engine, "close", lambda engine: closed.append(engine))
    with pytest.raises(hf_paged.PluginError, match="no"):
        hf_paged.explain(llama, hf_paged.PagedConfig(plugins=(Plugin(),)))
    assert len(closed) == 1


def test_an_engine_goes_without_the_garbage_collector(llama: PreTrainedModel) -> None:
    handle = hf_paged.patch(llama)
    llama.generate(**BATCH, **KWARGS)
    built, _ = handle.engine()
    engine = weakref.ref(built.engine)
    gc.collect()
    gc.disable()
    try:
        hf_paged.unpatch(llama)
        del built, handle, _
        assert engine() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------------------- wrappers


class Wrapped(nn.Module):
    """As DistributedDataParallel and torch.compile have it."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        setattr(self, name, model)


@pytest.mark.parametrize(
    "wrap", [lambda m: Wrapped(m, "module"), lambda m: Wrapped(Wrapped(m, "_orig_mod"), "module"), torch.compile]
)
def test_wrappers(llama: PreTrainedModel, wrap: Any) -> None:
    wrapper = wrap(llama)
    handle = hf_paged.patch(wrapper)
    assert handle is not None
    assert handle.model is llama
    assert hf_paged.patch(llama) is handle
    llama.generate(**BATCH, **KWARGS)
    assert hits(handle) > 0
    assert hf_paged.explain(wrapper).patched
    hf_paged.unpatch(wrapper)
    assert "generate" not in vars(llama)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_distributed_data_parallel(llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one, in a group of one process; a training step through it counts at once."""
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapper = nn.parallel.DistributedDataParallel(llama)
        with hf_paged.paged(wrapper, on_unsupported="error") as handle:
            first = llama.generate(**BATCH, **KWARGS)
            optimizer = torch.optim.SGD(wrapper.parameters(), lr=3.0)
            wrapper(**BATCH, labels=BATCH["input_ids"]).loss.backward()
            optimizer.step()
            second = llama.generate(**BATCH, **KWARGS)
            assert handle.model is llama
            assert hits(handle) > 0
        assert second.tolist() != first.tolist()
        same_tensor(second, llama.generate(**BATCH, **KWARGS))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(llama: PreTrainedModel, precision: str) -> None:
    """What Accelerate prepares is the model itself, its forward wrapped where it is to run in another precision."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    try:
        model = accelerator.prepare_model(llama, evaluation_mode=True)
        before = snapshot(llama)
        # In half precision the shape of a batch decides near-ties: one row alone has stock's shape.
        batch = padded(zoo.prompts(2, (11,)))
        expected = model.generate(**batch, **KWARGS)
        with hf_paged.paged(model, on_unsupported="error") as handle:
            same_tensor(model.generate(**batch, **KWARGS), expected)
            assert handle.model is llama
            assert hits(handle) > 0
        assert snapshot(llama) == before
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_peft(llama: PreTrainedModel) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(llama, config).eval()
    before = snapshot(llama)
    expected = model.generate(**BATCH, **KWARGS)
    with hf_paged.paged(Wrapped(model, "module"), on_unsupported="error") as handle:
        assert handle.model is llama
        same_tensor(model.generate(**BATCH, **KWARGS), expected)
        assert hits(handle) > 0
    assert snapshot(llama) == before


def test_adapters_put_on_a_patched_model(llama: PreTrainedModel) -> None:
    with hf_paged.paged(llama, on_unsupported="error") as handle:
        plain = llama.generate(**BATCH, **KWARGS)
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(llama, config).eval()
        tuned = model.generate(**BATCH, **KWARGS)
        seen = hits(handle)
        assert seen > 0
        same_tensor(model.unload().generate(**BATCH, **KWARGS), plain)
    torch.manual_seed(0)
    same_tensor(peft.get_peft_model(llama, config).eval().generate(**BATCH, **KWARGS), tuned)


# ------------------------------------------------------------------------------------------------ generate()s of others


class Own(LlamaForCausalLM):
    def generate(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return super().generate(input_ids.flip(1), **kwargs)


def own_model() -> PreTrainedModel:
    model = zoo.build("llama")
    model.__class__ = Own
    return model


@pytest.mark.parametrize("everything", [False, True])
def test_a_class_with_a_generate_of_its_own(everything: bool) -> None:
    model, ids = own_model(), torch.tensor(zoo.prompts(2, (7,)))
    expected = model.generate(ids, **KWARGS)
    hf_paged.patch(None if everything else model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            same_tensor(model.generate(ids, **KWARGS), expected)
            same_tensor(model.generate(ids, **KWARGS, num_beams=2)[:, :7], expected[:, :7])
    hf_paged.unpatch(None if everything else model)
    same_tensor(model.generate(ids, **KWARGS), expected)


def test_an_instance_with_a_generate_of_its_own(llama: PreTrainedModel) -> None:
    calls = []

    def own(*args: Any, **kwargs: Any) -> str:
        calls.append(args)
        return "own"

    llama.generate = own
    before = dict(vars(llama))
    hf_paged.patch(llama)
    with pytest.warns(UserWarning, match="of its own"):
        assert llama.generate(**BATCH, **KWARGS) == "own"
    hf_paged.unpatch(llama)
    assert vars(llama) == before


class OtherInputs(LlamaForCausalLM):
    """What a subclass may do that no flat batch shows."""

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        inputs["input_ids"] = (inputs["input_ids"] + 1) % 200
        return inputs


def test_a_class_that_prepares_its_inputs_otherwise(llama: PreTrainedModel) -> None:
    llama.__class__ = OtherInputs
    expected = llama.generate(**BATCH, **KWARGS)
    hf_paged.patch(llama)
    with pytest.warns(UserWarning, match="prepare_inputs_for_generation"):
        same_tensor(llama.generate(**BATCH, **KWARGS), expected)


# ---------------------------------------------------------------------------------------------------------- every model


def test_patch_everything(llama: PreTrainedModel) -> None:
    stock_generate = GenerationMixin.generate
    before = snapshot(llama)
    expected = llama.generate(**BATCH, **KWARGS)
    hf_paged.patch(block_size=8)
    hf_paged.patch(block_size=8)
    with pytest.raises(hf_paged.ConfigError, match="unpatch"):
        hf_paged.patch(block_size=4)
    later = zoo.build("llama")
    for model in (llama, later):
        same_tensor(model.generate(**BATCH, **KWARGS), expected)
        handle = patched(model)
        assert handle is not None
        assert handle.config.block_size == 8
        assert hits(handle) > 0
    with pytest.warns(UserWarning, match="beam search"):
        llama.generate(**BATCH, **KWARGS, num_beams=2)
    bound = later.generate
    hf_paged.unpatch()
    assert GenerationMixin.generate is stock_generate
    same_tensor(bound(**BATCH, **KWARGS), expected)
    assert "generate" not in vars(later)
    assert snapshot(llama) == before


def test_patch_everything_but(llama: PreTrainedModel) -> None:
    expected = llama.generate(**BATCH, **KWARGS)
    hf_paged.patch()
    llama.generate(**BATCH, **KWARGS)
    hf_paged.unpatch(llama)
    same_tensor(llama.generate(**BATCH, **KWARGS), expected)
    assert patched(llama) is None
    with hf_paged.paged(llama):
        pass
    llama.generate(**BATCH, **KWARGS)
    assert patched(llama) is None
    hf_paged.patch()
    llama.generate(**BATCH, **KWARGS)
    assert patched(llama) is not None
    with hf_paged.paged(llama):
        pass
    hf_paged.unpatch()
    assert patched(llama) is None


def test_an_explicit_patch_outlives_patch_everything(llama: PreTrainedModel) -> None:
    hf_paged.patch()
    llama.generate(**BATCH, **KWARGS)
    handle = hf_paged.patch(llama)
    hf_paged.unpatch()
    assert patched(llama) is handle
    hf_paged.unpatch(llama)
    assert patched(llama) is None


def test_a_reason_is_told_once_whatever_its_numbers(llama: PreTrainedModel) -> None:
    hf_paged.patch(llama)
    with caught() as warned:
        for length in (600, 601):
            llama.generate(**BATCH, max_new_tokens=length, max_time=0.01, do_sample=False)
    assert len([message for message in warned if "positions" in message]) == 1


def test_an_encoder() -> None:
    config = transformers.BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.BertModel(config)
    assert "generates" in str(hf_paged.explain(model).reason)
    hf_paged.patch(model)
    hf_paged.unpatch(model)
    assert "generate" not in vars(model)


def test_patch_everything_and_encoder_decoders() -> None:
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    ).eval()
    ids = torch.tensor([[5, 6, 7, 1]])
    expected = model.generate(ids, max_new_tokens=4)
    hf_paged.patch()
    with pytest.warns(UserWarning, match="encoder-decoder"):
        same_tensor(model.generate(ids, max_new_tokens=4), expected)


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:253]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def test_pipelines(llama: PreTrainedModel) -> None:
    texts = ["a paged cache", "b", "continuous batching of rows"]
    pipe = transformers.pipeline("text-generation", model=llama, tokenizer=tokenizer())
    kwargs: dict[str, Any] = {"max_new_tokens": 9, "batch_size": 3}
    expected = pipe(texts, do_sample=False, **kwargs)
    torch.manual_seed(0)
    sampled = pipe(texts, do_sample=True, num_return_sequences=2, **kwargs)
    hf_paged.patch(on_unsupported="error")
    assert pipe(texts, do_sample=False, **kwargs) == expected
    torch.manual_seed(0)
    assert pipe(texts, do_sample=True, num_return_sequences=2, **kwargs) == sampled
    handle = hf_paged.patch(llama)
    assert handle is not None
    assert hits(handle) > 0


# --------------------------------------------------------------------------------------------- others on the same model


def test_two_models_share_a_config(llama: PreTrainedModel) -> None:
    other = zoo.build("llama", seed=4)
    other.config = llama.config
    for module in other.modules():
        if hasattr(module, "config"):
            module.config = llama.config
    expected = [model.generate(**BATCH, **KWARGS) for model in (llama, other)]
    hf_paged.patch(llama, on_unsupported="error")
    same_tensor(other.generate(**BATCH, **KWARGS), expected[1])
    hf_paged.patch(other, on_unsupported="error")
    for _ in range(2):
        same_tensor(llama.generate(**BATCH, **KWARGS), expected[0])
        same_tensor(other.generate(**BATCH, **KWARGS), expected[1])
    hf_paged.unpatch(llama)
    same_tensor(other.generate(**BATCH, **KWARGS), expected[1])
    assert llama.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_another_thread_trains_meanwhile(family: str, attention: str) -> None:
    """Its forwards and backwards get their own attention and masks while generate() switches the config."""
    model = zoo.build(family)
    model.set_attn_implementation(attention)
    before = snapshot(model)
    labels = BATCH["input_ids"].masked_fill(BATCH["attention_mask"] == 0, -100)

    def loss() -> tuple[float, float]:
        parameter = model.model.layers[0].self_attn.q_proj.weight
        value = model(**BATCH, labels=labels).loss
        (gradient,) = torch.autograd.grad(value, parameter)
        return float(value), float(gradient.norm())

    expected = loss()
    answer = model.generate(**BATCH, max_new_tokens=40, do_sample=False)
    trained = threading.Event()
    answers: list[torch.Tensor] = []

    def generate() -> None:
        while not trained.is_set():
            answers.append(model.generate(**BATCH, max_new_tokens=40, do_sample=False))

    with hf_paged.paged(model, on_unsupported="error"):
        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            losses = [loss()]
            while thread.is_alive() and (len(losses) < 8 or len(answers) < 3):
                losses.append(loss())
        finally:
            trained.set()
        thread.join()
    assert len(answers) >= 3
    assert set(losses) == {expected}
    for got in answers:
        same_tensor(got, answer)
    after = snapshot(model)
    assert after == before
