"""Looking at a model and a call costs no engine that is good, says one line, and never raises an error of its own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, get_peft_model
from stock import assert_same, caught, padded, same_tensor
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_paged
import zoo
from hf_paged.hf.weights import WeightWatch, structure

BATCH = padded(zoo.prompts(7, (9, 4)))
KWARGS: dict[str, Any] = dict(max_new_tokens=6, do_sample=False)


# ------------------------------------------------------------------------------------------------------- tensor classes


class Rude(torch.Tensor):
    """A wrapper that knows linear layers and refuses every other operation, as some quantised weights do."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Rude:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.inner, *bias, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(f"Rude dispatch: no implementation of {func}")


def rude(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.mlp.down_proj.weight = nn.Parameter(Rude(layer.mlp.down_proj.weight.detach()), requires_grad=False)
    model.lm_head.weight = nn.Parameter(Rude(model.lm_head.weight.detach()), requires_grad=False)


def sparse_csr(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        weight = layer.mlp.up_proj.weight.detach()
        weight = torch.where(weight.abs() > weight.abs().median(), weight, 0.0)
        layer.mlp.up_proj.weight = nn.Parameter(weight.to_sparse_csr(), requires_grad=False)


def sparse_coo_buffer(model: PreTrainedModel) -> None:
    model.register_buffer("a_table", torch.eye(4).to_sparse())


def int8_weights(model: PreTrainedModel) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())


def int8_activations(model: PreTrainedModel) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())


def int4_weights(model: PreTrainedModel) -> None:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_

    quantize_(model, Int8DynamicActivationIntxWeightConfig())


def float8_weights(model: PreTrainedModel) -> None:
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    quantize_(model, Float8WeightOnlyConfig())


WEIGHTS = [
    rude, sparse_csr, sparse_coo_buffer, int8_weights, int8_activations, int4_weights, float8_weights,
]  # fmt: skip
CARRIED = [rude, sparse_csr, sparse_coo_buffer, int8_weights, int4_weights, float8_weights]


@pytest.mark.parametrize("change", WEIGHTS)
def test_weights_of_any_class_are_carried_or_stocks_with_a_reason(llama: PreTrainedModel, change: Any) -> None:
    change(llama)
    expected = llama.generate(**BATCH, **KWARGS)
    handle = hf_paged.patch(llama)
    with caught() as warned:
        same_tensor(llama.generate(**BATCH, **KWARGS), expected)
        same_tensor(llama.generate(**BATCH, **KWARGS), expected)
    assert (handle.stats.reserved_tokens > 0) is (change in CARRIED)
    assert len(warned) == (change not in CARRIED)
    assert all("\n" not in line for line in warned)


def test_quantised_weights_from_a_checkpoint(llama: PreTrainedModel, tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    llama.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    assert_same(model.eval(), **BATCH, **KWARGS)


@pytest.mark.parametrize("change", CARRIED)
def test_a_write_to_such_weights_is_noticed(llama: PreTrainedModel, change: Any) -> None:
    change(llama)
    watch = WeightWatch(llama)
    before = watch.fingerprint()
    assert watch.fingerprint() == before
    inner = {
        rude: lambda: llama.model.embed_tokens.weight,  # what is inside a rude one can't be seen
        sparse_csr: lambda: llama.model.layers[0].mlp.up_proj.weight.values(),
        sparse_coo_buffer: lambda: llama.a_table._values(),
        int8_weights: lambda: llama.model.layers[0].mlp.up_proj.weight.qdata,
        int4_weights: lambda: llama.model.layers[0].mlp.up_proj.weight.qdata,
        float8_weights: lambda: llama.model.layers[0].mlp.up_proj.weight.scale,
    }
    with torch.no_grad():
        inner[change]().add_(1)
    assert watch.fingerprint() != before


@pytest.fixture
def gloo(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("placement", [Shard(0), Replicate()])
def test_sharded_weights(llama: PreTrainedModel, placement: Any, gloo: None) -> None:
    """As tensor parallelism and FSDP2 have them; a plain forward over them needs their own hooks, or raises."""
    mesh = init_device_mesh("cpu", (1,))
    for layer in llama.model.layers:
        weight = distribute_tensor(layer.mlp.down_proj.weight.detach(), mesh, [placement])
        layer.mlp.down_proj.weight = nn.Parameter(weight, requires_grad=False)
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, args: (DTensor.from_local(args[0], mesh, [Replicate()]),)
        )
        layer.mlp.down_proj.register_forward_hook(lambda module, args, output: output.full_tensor())
    expected = llama.generate(**BATCH, **KWARGS)
    hf_paged.patch(llama)
    with caught():
        same_tensor(llama.generate(**BATCH, **KWARGS), expected)


def test_fully_sharded(llama: PreTrainedModel, gloo: None) -> None:
    from torch.distributed.fsdp import fully_shard

    expected = llama.generate(**BATCH, **KWARGS)
    for layer in llama.model.layers:
        fully_shard(layer)
    fully_shard(llama)
    hf_paged.patch(llama)
    with caught() as warned:
        same_tensor(llama.generate(**BATCH, **KWARGS), expected)
        assert hf_paged.explain(llama).path in ("flat", "stock")
    assert all("\n" not in line for line in warned)


# ------------------------------------------------------------------------------------------------------------ offloaded


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_an_offloaded_model_is_stocks(llama: PreTrainedModel, kind: str, tmp_path: Path) -> None:
    expected = llama.generate(**BATCH, **KWARGS)
    if kind == "cpu":
        cpu_offload(llama, execution_device=torch.device("cpu"))
    else:
        disk_offload(llama, str(tmp_path), execution_device=torch.device("cpu"))
    hf_paged.patch(llama)
    with caught() as warned:
        same_tensor(llama.generate(**BATCH, **KWARGS), expected)
        llama.generate(**BATCH, **KWARGS)
    assert len(warned) == 1
    assert "offloaded" in warned[0]
    assert "offloaded" in str(hf_paged.explain(llama).reason)


def test_a_part_that_is_offloaded(llama: PreTrainedModel) -> None:
    expected = llama.generate(**BATCH, **KWARGS)
    cpu_offload(llama.model.layers[1].mlp, execution_device=torch.device("cpu"))
    hf_paged.patch(llama)
    with caught() as warned:
        same_tensor(llama.generate(**BATCH, **KWARGS), expected)
    assert len(warned) == 1


# ------------------------------------------------------------------------------------------------------------- compiled


def compiled_in_place(model: PreTrainedModel) -> PreTrainedModel:
    model.compile(backend="eager")
    return model


def compiled_forward(model: PreTrainedModel) -> PreTrainedModel:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_layers(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def compiled_modules(model: PreTrainedModel) -> PreTrainedModel:
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="eager")
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


def compiled_whole(model: PreTrainedModel) -> Any:
    return torch.compile(model, backend="eager")


COMPILED = [compiled_in_place, compiled_forward, compiled_layers, compiled_modules, compiled_whole]


@pytest.mark.parametrize("compiled", COMPILED)
@pytest.mark.parametrize("when", ["before the patch", "after a call"])
def test_a_compiled_model_is_carried_past_the_compiler(llama: PreTrainedModel, compiled: Any, when: str) -> None:
    """In steps only: outside of them the compiled parts are where they were, and serve."""
    torch._dynamo.reset()
    expected = llama.generate(**BATCH, **KWARGS)
    model: Any = llama
    if when == "before the patch":
        model = compiled(llama)
    handle = hf_paged.patch(model, on_unsupported="error")
    same_tensor(model.generate(**BATCH, **KWARGS), expected)
    if when == "after a call":
        model = compiled(llama)
    tokens = handle.stats.reserved_tokens
    torch._dynamo.utils.counters.clear()
    same_tensor(model.generate(**BATCH, **KWARGS), expected)
    assert handle.stats.reserved_tokens > tokens
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model(**BATCH)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
    hf_paged.unpatch(model)
    torch._dynamo.reset()


def test_a_reason_is_one_line(llama: PreTrainedModel) -> None:
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("cannot go on\n" + "here is a page about why\n" * 30)

    llama.model.layers[0].mlp.forward = forward
    hf_paged.patch(llama)
    with caught() as warned, pytest.raises(RuntimeError, match="cannot go on"):
        llama.generate(**BATCH, **KWARGS)
    (line,) = warned
    assert "\n" not in line
    assert "cannot go on" in line
    assert "\n" not in str(hf_paged.explain(llama).reason)


# -------------------------------------------------------------------------------------------------------- few positions


@pytest.mark.parametrize("positions", [6, 20, 64])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_a_model_of_few_positions_is_carried(family: str, positions: int) -> None:
    config = zoo.tiny_config(family)
    config.max_position_embeddings = positions
    torch.manual_seed(0)
    model = zoo.model_class(family)(config).eval()
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    assert hf_paged.explain(model).path == "flat"
    ids = torch.tensor(zoo.prompts(1, (positions // 2,)))
    assert_same(model, ids, max_new_tokens=positions // 2 - 1, do_sample=False)


# -------------------------------------------------------------------------------------- hooks that don't change a thing


def enable_again(model: PreTrainedModel) -> None:
    """What TRL does at each rollout; Transformers leaves a hook behind each time."""
    model.gradient_checkpointing_disable()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()


def a_recipes_own(model: PreTrainedModel) -> None:
    def make_inputs_require_grad(module: nn.Module, input: Any, output: torch.Tensor) -> None:
        output.requires_grad_(True)

    model.get_input_embeddings().register_forward_hook(make_inputs_require_grad)


@pytest.mark.parametrize("leave", [enable_again, a_recipes_own])
def test_hooks_of_gradient_checkpointing_cost_no_engine(llama: PreTrainedModel, leave: Any) -> None:
    llama.train()
    expected = llama.generate(**BATCH, **KWARGS)
    with hf_paged.paged(llama, on_unsupported="error", fusions=True, block_size=4) as handle:
        same_tensor(llama.generate(**BATCH, **KWARGS), expected)
        built, _ = handle.engine()
        report = list(built.fusion.report())
        for _ in range(3):
            leave(llama)
            same_tensor(llama.generate(**BATCH, **KWARGS), expected)
            assert handle.engine()[0] is built
        assert handle.stats.prefix_hits > 0
    leave(llama)
    with hf_paged.paged(llama, on_unsupported="error", fusions=True) as handle:
        llama.generate(**BATCH, **KWARGS)
        assert list(handle.engine()[0].fusion.report()) == report  # the last layer's trimmed output among them


def test_a_hook_of_that_name_that_does_more_counts(llama: PreTrainedModel) -> None:
    def make_inputs_require_grads(module: nn.Module, input: Any, output: torch.Tensor) -> torch.Tensor:
        return output.requires_grad_(True) * 2

    before, expected = structure(llama), llama.generate(**BATCH, **KWARGS)
    llama.get_input_embeddings().register_forward_hook(make_inputs_require_grads)
    assert structure(llama) != before
    got, _ = assert_same(llama, **BATCH, **KWARGS)
    assert got[0].tolist() != expected.tolist()


# ------------------------------------------------------------------------------------ arguments before the model's look


def test_adapter_names_cost_no_engine(llama: PreTrainedModel) -> None:
    """A call that can't be carried leaves the engine and its prefix cache as they are."""
    adapted = get_peft_model(llama, LoraConfig(target_modules=["q_proj"], init_lora_weights=False), adapter_name="one")
    adapted.eval()
    with hf_paged.paged(adapted) as handle:
        expected = adapted.generate(**BATCH, **KWARGS)
        built, _ = handle.engine()
        with caught() as warned:
            adapted.generate(**BATCH, **KWARGS, adapter_names=["one", "__base__"])
        assert len(warned) == 1
        assert "adapter_names" in warned[0]
        assert handle.engine()[0] is built
        hits = handle.stats.prefix_hits
        same_tensor(adapted.generate(**BATCH, **KWARGS), expected)
        assert handle.stats.prefix_hits == hits or handle.stats.prefix_queries > 0


@pytest.mark.parametrize(
    "arguments",
    [{"num_beams": 2}, {"output_attentions": True, "return_dict_in_generate": True}, {"position_ids": None}],
    ids=str,
)
def test_a_call_that_falls_back_costs_no_engine(llama: PreTrainedModel, arguments: dict[str, Any]) -> None:
    with hf_paged.paged(llama, on_unsupported="silent") as handle:
        llama.generate(**BATCH, **KWARGS)
        built, _ = handle.engine()
        llama.generate(**BATCH, **{**KWARGS, **arguments})
        assert handle.engine()[0] is built


# ---------------------------------------------------------------------------------------------- calls that stock makes


def test_calls_that_transformers_makes_itself_are_quiet(llama: PreTrainedModel) -> None:
    """An assistant's, inside a fallback: its user passed none of the arguments that can't be carried."""
    assistant = copy.deepcopy(llama)
    ids = BATCH["input_ids"][:1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = llama.generate(ids, assistant_model=assistant, **KWARGS)
    hf_paged.patch()
    with caught() as warned:
        same_tensor(llama.generate(ids, assistant_model=assistant, **KWARGS), expected)
    assert len(warned) == 1
    assert "assisted decoding" in warned[0]
    hf_paged.unpatch()
    hf_paged.patch(llama, on_unsupported="warn")
    hf_paged.patch(assistant, on_unsupported="error")
    with caught() as warned:
        same_tensor(llama.generate(ids, assistant_model=assistant, **KWARGS), expected)
    assert len(warned) == 1
