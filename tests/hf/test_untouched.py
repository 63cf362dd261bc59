"""To everything that isn't the engine a patched model is as its owner made it, and it goes when its owner lets go."""

from __future__ import annotations

import copy
import gc
import io
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from stock import same_tensor
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import PreTrainedModel, pipeline

import hf_paged
import zoo
from hf_paged.hf.fusion import fusion

IDS = torch.tensor(zoo.prompts(6, (9,)))
KWARGS: dict[str, Any] = dict(max_new_tokens=6, do_sample=False)
FUSED: dict[str, Any] = dict(fusions=True, on_unsupported="error")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def used(llama: PreTrainedModel) -> PreTrainedModel:
    """A patched model that has answered a call, with fused layers."""
    hf_paged.patch(llama, **FUSED)
    llama.generate(IDS, **KWARGS)
    assert any("layers fused" in line for line in hf_paged.explain(llama).fused)
    return llama


def modules_of_forwards(model: nn.Module) -> dict[str, Any]:
    return {name: vars(module).get("forward") for name, module in model.named_modules()}


def test_no_module_has_a_forward_of_ours_between_calls(used: PreTrainedModel) -> None:
    assert not any(modules_of_forwards(used).values())


def test_it_compiles_in_one_graph(used: PreTrainedModel) -> None:
    expected = used(IDS, use_cache=False).logits
    found = torch._dynamo.explain(used)(IDS, use_cache=False)
    assert found.graph_break_count == 0
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(used, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected)
    assert counter.frame_count == 1
    used.generate(IDS, **KWARGS)  # and what was compiled stays good for after the next call
    compiled(IDS, use_cache=False)
    assert counter.frame_count == 1


def test_it_exports_as_before(llama: PreTrainedModel) -> None:
    class Logits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, use_cache=False).logits

    before = torch.export.export(Logits(llama), (IDS,), strict=False)
    hf_paged.patch(llama, **FUSED)
    llama.generate(IDS, **KWARGS)
    after = torch.export.export(Logits(llama), (IDS,), strict=False)
    assert [node.target for node in after.graph.nodes] == [node.target for node in before.graph.nodes]


def test_it_traces_as_before(llama: PreTrainedModel) -> None:
    llama.requires_grad_(False)

    def traced() -> Any:
        model = torch.jit.trace(lambda ids: llama(ids, use_cache=False).logits, (IDS,), check_trace=False)
        return [node.kind() for node in model.graph.nodes()]

    before = traced()
    hf_paged.patch(llama, **FUSED)
    llama.generate(IDS, **KWARGS)
    assert traced() == before


def test_it_profiles_as_before(llama: PreTrainedModel) -> None:
    def profiled() -> list[str]:
        with torch.profiler.profile(with_modules=True) as profile, torch.no_grad():
            llama(IDS, use_cache=False)
        return [event.name for event in profile.events()]

    before = profiled()
    hf_paged.patch(llama, **FUSED)
    llama.generate(IDS, **KWARGS)
    assert profiled() == before


def test_hooks_of_the_owner_see_what_they_saw(llama: PreTrainedModel) -> None:
    seen: list[Any] = []
    hook = llama.model.layers[0].mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    llama(IDS)
    hf_paged.patch(llama, **FUSED)
    llama.generate(IDS, **KWARGS)
    seen.clear()
    llama(IDS)
    hook.remove()
    assert seen == [(1, 9, 64)]


def test_another_thread_that_compiles_during_steps_gets_the_models_own(used: PreTrainedModel) -> None:
    expected = used(IDS, use_cache=False).logits.detach()
    stop, errors = threading.Event(), []

    def steps() -> None:
        try:
            while not stop.is_set():
                used.generate(IDS, **KWARGS)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=steps)
    thread.start()
    try:
        for _ in range(3):
            torch._dynamo.reset()
            got = torch.compile(used.model.layers[0].mlp, backend="eager")(torch.ones(1, 2, 64))
            torch.testing.assert_close(got, used.model.layers[0].mlp(torch.ones(1, 2, 64)))
            torch.testing.assert_close(used(IDS, use_cache=False).logits, expected)
    finally:
        stop.set()
        thread.join(60)
    assert not errors


# -------------------------------------------------------------------------------------------------------- saved, copied

LOAD = """
import sys
sys.modules["hf_paged"] = None  # as where it isn't installed
import torch
model = torch.load(sys.argv[1], weights_only=False)
ids = torch.tensor([[5, 6, 7, 8]])
print(model.generate(ids, max_new_tokens=6, do_sample=False).tolist())
"""


@pytest.mark.parametrize("when", ["before a call", "after a call"])
def test_a_saved_model_loads_where_hf_paged_is_not_installed(llama: PreTrainedModel, when: str, tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = llama.generate(ids, **KWARGS).tolist()
    hf_paged.patch(llama, **FUSED)
    if when == "after a call":
        llama.generate(ids, **KWARGS)
    torch.save(llama, tmp_path / "model.pt")
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    done = subprocess.run([sys.executable, str(script), str(tmp_path / "model.pt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(expected)


def test_a_saved_model_is_as_large_as_stocks(llama: PreTrainedModel) -> None:
    def size() -> int:
        buffer = io.BytesIO()
        torch.save(llama, buffer)
        return len(buffer.getvalue())

    before = size()
    hf_paged.patch(llama, **FUSED)
    llama.generate(IDS, **KWARGS)
    assert size() == pytest.approx(before, rel=0.02)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
def test_a_copy_that_is_made_during_a_step_is_plain(llama: PreTrainedModel, copied: Any) -> None:
    copies: list[Any] = []
    hook = llama.model.norm.register_forward_pre_hook(
        lambda *args: None if copies else copies.append(copied(llama.model))
    )
    hf_paged.patch(llama, **FUSED)
    llama.generate(IDS, **KWARGS)
    hook.remove()
    if copied is copy.deepcopy:
        twin = copies[0]
        torch.testing.assert_close(twin(IDS).last_hidden_state, llama.model(IDS).last_hidden_state)


# --------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral", "gpt2"])
@pytest.mark.parametrize("how", ["patch", "keep_pool", "everything", "explain"])
def test_deleting_the_model_frees_it_at_once(family: str, how: str) -> None:
    """Without the garbage collector, as without the patch."""
    model = zoo.build(family)
    gc.collect()
    gc.disable()
    try:
        if how == "everything":
            hf_paged.patch()
        elif how == "explain":
            hf_paged.explain(model)
        else:
            hf_paged.patch(model, keep_pool=how == "keep_pool", on_unsupported="error")
        model.generate(IDS, **KWARGS)
        parts = [weakref.ref(part) for part in (*model.modules(), *model.parameters())]
        del model
        assert [part() for part in parts if part() is not None] == []
    finally:
        gc.enable()


def test_an_llm_that_is_collected_in_a_cycle_gives_weights_back(llama: Any) -> None:
    """Whenever the collection begins: also while another model's layers are being fused."""

    def merged() -> bool:
        attention = llama.model.layers[0].self_attn
        return len({p.weight.untyped_storage().data_ptr() for p in (attention.q_proj, attention.k_proj)}) == 1

    def used_in_a_cycle() -> None:
        holder = Holder(hf_paged.LLM(llama, skip_tokenizer_init=True))
        holder.itself = holder  # type: ignore[attr-defined]
        holder.model.generate([[5, 6]], hf_paged.SamplingParams(max_tokens=2), use_tqdm=False)
        assert merged()

    used_in_a_cycle()
    gc.collect()
    assert not merged()
    used_in_a_cycle()
    gc.disable()
    collected = []

    def install(self: Any, *arguments: Any) -> None:
        collected.append(gc.collect())
        original(self, *arguments)

    original = fusion.Fusion._install
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusion.Fusion, "_install", install)
        try:
            with hf_paged.paged(zoo.build("llama")) as handle:
                handle.generate(IDS, **KWARGS)
        finally:
            gc.enable()
    assert collected
    assert not merged()


def test_a_handle_that_outlives_its_model_says_so() -> None:
    handle = hf_paged.patch(zoo.build("llama"))
    assert handle is not None
    with pytest.raises(hf_paged.UnsupportedModelError, match="the model is gone"):
        handle.generate(IDS, **KWARGS)
    assert handle.stats.pool_bytes == 0


# ------------------------------------------------------------------------------------------------- what holds a model


class Holder:
    """As a trainer or a task's wrapper has it."""

    def __init__(self, model: Any) -> None:
        self.model = model


@pytest.mark.parametrize("kind", ["pipeline", "holder", "holder of a wrapper"])
def test_what_holds_a_model_can_be_patched(llama: PreTrainedModel, kind: str) -> None:
    from tiny import tokenizer

    makers: dict[str, Any] = {
        "pipeline": lambda: pipeline("text-generation", model=llama, tokenizer=tokenizer()),
        "holder": lambda: Holder(llama),
        "holder of a wrapper": lambda: Holder(Holder(llama)),
    }
    thing = makers[kind]()
    expected = llama.generate(IDS, **KWARGS)
    handle = hf_paged.patch(thing, on_unsupported="error")
    assert handle is not None
    assert handle.model is llama
    same_tensor(llama.generate(IDS, **KWARGS), expected)
    assert handle.stats.reserved_tokens > 0
    assert hf_paged.explain(thing).patched
    hf_paged.unpatch(thing)
    assert "generate" not in vars(llama)


def test_a_trainer_can_be_patched(llama: PreTrainedModel, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    trainer = Trainer(llama, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    assert hf_paged.patch(trainer).model is llama
    with hf_paged.paged(trainer) as handle:
        llama.generate(IDS, **KWARGS)
        assert handle.stats.reserved_tokens > 0


def test_what_holds_something_else_is_named() -> None:
    with pytest.raises(hf_paged.UnsupportedModelError, match="got Holder"):
        hf_paged.patch(Holder("a name"))
    with pytest.raises(hf_paged.UnsupportedModelError, match="got Holder"):
        hf_paged.patch(Holder(nn.Linear(2, 2)))
