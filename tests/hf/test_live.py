"""The live model: it runs on the weights as they are now, and everything is as it was after a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from stock import both, free, padded, same_tensor, snapshot
from torch import nn
from transformers import LogitsProcessor, PreTrainedModel, StoppingCriteria

import hf_paged
import zoo
from hf_paged.hf.prepare import STOCK_GENERATE
from hf_paged.hf.weights import WeightWatch

BATCH = padded(zoo.prompts(2, (21, 9, 17)))
KWARGS: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}


def stock(model: PreTrainedModel) -> torch.Tensor:
    """Stock's answer on the weights of this moment."""
    return STOCK_GENERATE(model, **BATCH, **KWARGS)


# --------------------------------------------------------------------------------------------------- the weights change


def optimizer_step(model: PreTrainedModel) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model(input_ids=BATCH["input_ids"], labels=BATCH["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def tiny_step(model: PreTrainedModel) -> None:
    """Too small for most elements to be told apart by value."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-7)
    model(input_ids=BATCH["input_ids"], labels=BATCH["input_ids"]).loss.backward()
    optimizer.step()


def copy_data(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.2)


def replace_data(model: PreTrainedModel) -> None:
    weight = model.model.layers[0].self_attn.v_proj.weight
    weight.data = weight.data.flip(0).clone()


def replace_parameter(model: PreTrainedModel) -> None:
    layer = model.model.layers[1].self_attn.k_proj
    layer.weight = nn.Parameter(layer.weight.detach().flip(0).clone())


def load_state(model: PreTrainedModel) -> None:
    model.load_state_dict(zoo.build("llama", seed=5).state_dict())


def assign_state(model: PreTrainedModel) -> None:
    model.load_state_dict(zoo.build("llama", seed=5).state_dict(), assign=True)


def one_element(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] += 4.0


def replace_module(model: PreTrainedModel) -> None:
    model.model.layers[0] = zoo.build("llama", seed=6).model.layers[0]


def add_hook(model: PreTrainedModel) -> None:
    """A steering vector."""
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output + 0.7)


CHANGES = [
    optimizer_step,
    copy_data,
    replace_data,
    replace_parameter,
    load_state,
    assign_state,
    one_element,
    replace_module,
    add_hook,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_voids_the_prefix_cache(llama: PreTrainedModel, change: Callable[[PreTrainedModel], None]) -> None:
    with hf_paged.paged(llama, block_size=4, on_unsupported="error") as handle:
        before = stock(llama)
        same_tensor(llama.generate(**BATCH, **KWARGS), before)
        same_tensor(llama.generate(**BATCH, **KWARGS), before)
        assert handle.stats.prefix_hits > 30
        change(llama)
        hits = handle.stats.prefix_hits
        after = stock(llama)
        assert after.tolist() != before.tolist()
        same_tensor(llama.generate(**BATCH, **KWARGS), after)
        assert handle.stats.prefix_hits == hits
        same_tensor(llama.generate(**BATCH, **KWARGS), after)
        assert handle.stats.prefix_hits > hits


def test_a_hook_that_no_flat_batch_can_carry(llama: PreTrainedModel) -> None:
    """Registered after the first call, it is found out before the next."""

    def steer(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, -1] += 0.5  # the last token of each row, or of the flat batch
        return output

    with hf_paged.paged(llama, on_unsupported="error") as handle:
        expected = llama.generate(**BATCH, **KWARGS)
        hook = llama.model.embed_tokens.register_forward_hook(steer)
        with pytest.raises(hf_paged.UnsupportedCallError, match="logits on a flat batch"):
            llama.generate(**BATCH, **KWARGS)
        hook.remove()
        same_tensor(llama.generate(**BATCH, **KWARGS), expected)
        assert len(handle._engines._engines) == 1
        assert handle.stats.prefix_queries > 0


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_another_window(family: str) -> None:
    model = zoo.build(family)
    with hf_paged.paged(model, on_unsupported="error") as handle:
        before = model.generate(**BATCH, **KWARGS)
        for module in model.modules():
            if getattr(module, "sliding_window", None) is not None:
                module.sliding_window = 3
        model.config.sliding_window = 3
        expected = stock(model)
        assert expected.tolist() != before.tolist()
        same_tensor(model.generate(**BATCH, **KWARGS), expected)
        assert len(handle._engines._engines) == 1


def test_engines_for_autocast_live_side_by_side(llama: PreTrainedModel) -> None:
    with hf_paged.paged(llama) as handle:
        llama.generate(**BATCH, **KWARGS)
        with torch.autocast("cpu", torch.bfloat16):
            llama.generate(**BATCH, **KWARGS)
        assert len(handle._engines._engines) == 2
        queries = handle.stats.prefix_queries
        llama.double()
        llama.generate(**BATCH, **KWARGS)
        assert len(handle._engines._engines) == 1
        assert handle.stats.prefix_queries > queries  # those of the dropped ones count


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_trial_that_ran_out_of_memory_is_tried_again(llama: PreTrainedModel, error: type[Exception]) -> None:
    armed = True

    def hook(module: nn.Module, args: Any) -> None:
        if armed:
            raise error("for a moment")

    expected = llama.generate(**BATCH, **KWARGS)
    llama.model.layers[1].register_forward_pre_hook(hook)
    with hf_paged.paged(llama, on_unsupported="error") as handle:
        with pytest.raises(hf_paged.UnsupportedCallError, match="for a moment"):
            llama.generate(**BATCH, **KWARGS)
        armed = False
        same_tensor(llama.generate(**BATCH, **KWARGS), expected)
        assert handle.stats.prefix_queries > 0


def test_a_tiny_step_voids_it_too(llama: PreTrainedModel) -> None:
    with hf_paged.paged(llama, block_size=4) as handle:
        llama.generate(**BATCH, **KWARGS)
        hits = handle.stats.prefix_hits
        tiny_step(llama)
        llama.generate(**BATCH, **KWARGS)
        assert handle.stats.prefix_hits == hits


def test_nothing_changed_and_nothing_is_voided(llama: PreTrainedModel) -> None:
    with hf_paged.paged(llama, block_size=4) as handle:
        llama.generate(**BATCH, **KWARGS)
        llama(**BATCH)
        llama.train()
        llama(**BATCH, labels=BATCH["input_ids"]).loss.backward()
        llama.eval()
        hits = handle.stats.prefix_hits
        llama.generate(**BATCH, **KWARGS)
        assert handle.stats.prefix_hits > hits


def lora(seed: int) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=4,
        lora_alpha=64,
        target_modules=["q_proj", "v_proj", "up_proj"],
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )


def test_lora_adapters_come_and_go(llama: PreTrainedModel) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(llama, lora(0), adapter_name="one")
    model.add_adapter("two", lora(1))
    model.eval()

    def answers() -> list[list[int]]:
        got, expected = model.generate(**BATCH, **KWARGS), stock(llama)
        same_tensor(got, expected)
        return got.tolist()

    with hf_paged.paged(model, block_size=4, on_unsupported="error") as handle:
        one = answers()
        model.set_adapter("two")
        two = answers()
        with model.disable_adapter():
            none = answers()
        assert one != two != none != one
        assert answers() == two
        assert handle.stats.prefix_hits == 0  # each was another model than the one before
        assert answers() == two
        assert handle.stats.prefix_hits > 0
        model.merge_adapter()
        answers()
        model.unmerge_adapter()
        model.set_adapter("one")
        answers()
        with torch.no_grad():
            llama.model.layers[0].self_attn.q_proj.lora_B["one"].weight.mul_(-2)
        assert answers() != one


def test_what_graphs_captured_is_void_after_a_switch_of_adapters(llama: PreTrainedModel) -> None:
    model = peft.get_peft_model(llama, lora(0), adapter_name="one")
    watch = WeightWatch(model)
    on = watch.graph_key()
    assert watch.graph_key() == on
    with model.disable_adapter():
        assert watch.graph_key() != on
    assert watch.graph_key() == on
    weight = next(model.parameters())
    weight.data = weight.data.clone()
    assert watch.graph_key() != on


def test_adapters_for_each_row_fall_back(llama: PreTrainedModel) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(llama, lora(0), adapter_name="one").eval()
    names = ["one", "__base__", "one"]
    expected = model.generate(**BATCH, **KWARGS, adapter_names=names)
    with hf_paged.paged(model) as handle, pytest.warns(UserWarning, match="adapter_names"):
        same_tensor(model.generate(**BATCH, **KWARGS, adapter_names=names), expected)
    assert handle.stats.reserved_tokens == 0


def test_prompt_tuning_falls_back(llama: PreTrainedModel) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(llama, peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")).eval()
    expected = model.generate(**BATCH, **KWARGS)
    with hf_paged.paged(model), pytest.warns(UserWarning, match="runs as in Transformers"):
        same_tensor(model.generate(**BATCH, **KWARGS), expected)


# ---------------------------------------------------------------------------------------------------- what stays behind


def test_memory(llama: PreTrainedModel) -> None:
    handle = hf_paged.patch(llama)
    assert handle is not None
    assert handle.stats.pool_bytes == 0
    llama.generate(**BATCH, **KWARGS)
    assert handle.stats.pool_bytes == handle.stats.num_blocks == 0
    with hf_paged.paged(llama):
        llama.generate(**BATCH, **KWARGS)
        assert handle.stats.pool_bytes > 0
        with hf_paged.paged(llama):
            llama.generate(**BATCH, **KWARGS)
        assert handle.stats.pool_bytes > 0
        assert free(handle.stats)
    assert handle.stats.pool_bytes == 0
    llama.generate(**BATCH, **KWARGS)
    assert handle.stats.pool_bytes == 0
    hf_paged.unpatch(llama)
    with hf_paged.paged(llama, keep_pool=False) as given_back:
        llama.generate(**BATCH, **KWARGS)
        assert given_back.stats.pool_bytes == 0
    kept = hf_paged.patch(llama, keep_pool=True)
    assert kept is not None
    llama.generate(**BATCH, **KWARGS)
    assert kept.stats.pool_bytes > 0


class Boom(Exception):
    pass


class Trap(LogitsProcessor):
    """A processor or streamer that goes off at its n-th call."""

    def __init__(self, error: type[BaseException], calls: int) -> None:
        self.error, self.left = error, calls

    def _tick(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error("tick")

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._tick()
        return scores

    def put(self, value: torch.Tensor) -> None:
        self._tick()

    def end(self) -> None:
        pass


class TrapCriterion(Trap, StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self._tick()
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("calls", [0, 1, 4])
@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["logits_processor", "stopping_criteria", "streamer"])
def test_what_a_callback_raises_reaches_the_caller(
    llama: PreTrainedModel, where: str, error: type[BaseException], calls: int
) -> None:
    trap = (TrapCriterion if where == "stopping_criteria" else Trap)(error, calls)
    before = snapshot(llama)
    expected = llama.generate(**BATCH, **KWARGS)
    with hf_paged.paged(llama, block_size=4, on_unsupported="error") as handle:
        with pytest.raises(error, match="tick"):
            llama.generate(**BATCH, **KWARGS, **{where: trap if where == "streamer" else [trap]})
        assert free(handle.stats)
        same_tensor(llama.generate(**BATCH, **KWARGS), expected)
        assert free(handle.stats)
    assert handle.stats.pool_bytes == 0
    assert snapshot(llama) == before


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
def test_what_the_model_raises_reaches_the_caller(llama: PreTrainedModel, error: type[BaseException]) -> None:
    calls, armed = [0], False

    def hook(module: nn.Module, args: Any) -> None:
        calls[0] += armed
        # An error at every forward: the engine tries again, with fewer rows.
        if armed and (calls[0] == 4 or error is not KeyboardInterrupt):
            raise error("in the forward")

    llama.model.layers[1].register_forward_pre_hook(hook)
    expected = llama.generate(**BATCH, **KWARGS)
    with hf_paged.paged(llama, block_size=4, on_unsupported="error") as handle:
        llama.generate(**BATCH, max_new_tokens=1)
        armed = True
        with pytest.raises(error, match="in the forward"):
            llama.generate(**BATCH, **KWARGS)
        armed = False
        assert free(handle.stats)
        assert llama.config._attn_implementation == "sdpa"
        same_tensor(llama.generate(**BATCH, **KWARGS), expected)


def test_a_passing_failure_of_the_model_is_outlived(llama: PreTrainedModel) -> None:
    """Out of memory for a moment: the step is tried again with fewer rows."""
    calls, armed = [0], False

    def hook(module: nn.Module, args: Any) -> None:
        calls[0] += armed
        if calls[0] == 4:
            raise RuntimeError("out of memory")

    llama.model.layers[1].register_forward_pre_hook(hook)
    expected = llama.generate(**BATCH, **KWARGS)
    with hf_paged.paged(llama, block_size=4, on_unsupported="error") as handle:
        llama.generate(**BATCH, max_new_tokens=1)
        armed = True
        same_tensor(llama.generate(**BATCH, **KWARGS), expected)
        assert calls[0] > 4
        assert free(handle.stats)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("training", [False, True])
def test_mode_and_attention_are_as_they_were(llama: PreTrainedModel, attention: str, training: bool) -> None:
    llama.set_attn_implementation(attention)
    llama.train(training)
    llama.model.layers[0].mlp.eval()  # modes may be mixed
    before = snapshot(llama)
    for kwargs in (KWARGS, {**KWARGS, "do_sample": True}, {**KWARGS, "num_beams": 2}):
        both(llama, **BATCH, **kwargs, options={"on_unsupported": "silent"})
    assert snapshot(llama) == before
    assert llama.config._attn_implementation == attention


def test_a_forward_between_calls_is_stocks(llama: PreTrainedModel) -> None:
    expected = llama(**BATCH).logits
    hf_paged.patch(llama)
    llama.generate(**BATCH, **KWARGS)
    assert torch.equal(llama(**BATCH).logits, expected)
