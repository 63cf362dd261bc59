"""Whose memory the weights lie in: what is shared stays shared, and what was there is there again afterwards."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from stock import same_tensor
from torch import nn
from transformers import PreTrainedModel

import hf_paged
import zoo

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])
KWARGS: dict[str, Any] = dict(max_new_tokens=8, do_sample=False)
OPTIONS: dict[str, Any] = dict(fusions=True, on_unsupported="error")


def _scale(tensors: Iterable[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.mul_(0.8)


def flat_buffer(model: PreTrainedModel) -> Callable[[], None]:
    """As optimizers and RL libraries that move all weights at once have it."""
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    start = 0
    for parameter in parameters:
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return lambda: _scale([flat])


def kept_data(model: PreTrainedModel) -> Callable[[], None]:
    """Somebody holds a `.data` of each parameter."""
    views = [parameter.data for parameter in model.parameters()]
    return lambda: _scale(views)


def numpy_arrays(model: PreTrainedModel) -> Callable[[], None]:
    arrays = [parameter.detach().numpy() for parameter in model.parameters()]

    def write() -> None:
        for array in arrays:
            array *= 0.9

    return write


def state_dict(model: PreTrainedModel) -> Callable[[], None]:
    state = model.state_dict()
    return lambda: _scale(state.values())


def shared_memory(model: PreTrainedModel) -> Callable[[], None]:
    """Another process writes them."""
    model.share_memory()

    def write() -> None:
        learner = multiprocessing.get_context("fork").Process(target=_learn, args=(list(model.parameters()),))
        learner.start()
        learner.join(60)
        assert learner.exitcode == 0

    return write


def _learn(parameters: list[nn.Parameter]) -> None:
    torch.set_num_threads(1)
    for parameter in parameters:
        parameter.data.mul_(0.9)


def one_layer_only(model: PreTrainedModel) -> Callable[[], None]:
    view = model.model.layers[1].self_attn.k_proj.weight.data
    return lambda: _scale([view])


def twins(model: PreTrainedModel) -> Callable[[], None]:
    """Two parameters over one memory, without being one parameter."""
    first, second = (layer.self_attn.q_proj for layer in model.model.layers)
    second.weight.data = first.weight.data
    return lambda: _scale([first.weight.data])


OWNERS = [flat_buffer, kept_data, numpy_arrays, state_dict, shared_memory, one_layer_only, twins]


def storages(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Where each parameter begins in its storage, and how large that is."""
    return {
        name: (parameter.storage_offset(), parameter.untyped_storage().nbytes())
        for name, parameter in model.named_parameters()
    }


def groups(model: PreTrainedModel) -> set[frozenset[str]]:
    """Which parameters share a storage."""
    found: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(parameter.untyped_storage().data_ptr(), set()).add(name)
    return set(map(frozenset, found.values()))


@pytest.mark.parametrize("owner", OWNERS)
def test_weights_that_somebody_else_writes_are_not_torn_away(llama: PreTrainedModel, owner: Any) -> None:
    """Before the first call, and with calls between: each write counts at once, and still after unpatch."""
    write = owner(llama)
    where, together = storages(llama), groups(llama)
    handle = hf_paged.patch(llama, **OPTIONS)
    answers = []
    for _ in range(3):
        expected = handle.stock(PROMPT, **KWARGS)
        same_tensor(llama.generate(PROMPT, **KWARGS), expected)
        answers.append(expected.tolist())
        write()
    hf_paged.unpatch(llama)
    assert len({str(answer) for answer in answers}) > 1
    assert (storages(llama), groups(llama)) == (where, together)
    before = [parameter.clone() for parameter in llama.parameters()]
    write()
    changed = [not torch.equal(new, old) for new, old in zip(llama.parameters(), before, strict=True)]
    assert sum(changed) >= (len(changed) - 1 if owner not in (one_layer_only, twins) else 1)


@pytest.mark.parametrize("owner", OWNERS)
def test_weights_that_get_another_owner_while_patched(llama: PreTrainedModel, owner: Any) -> None:
    """The merge is there already: what is shared from now on is followed too, during the patch and after it."""
    handle = hf_paged.patch(llama, **OPTIONS)
    llama.generate(PROMPT, **KWARGS)
    write = owner(llama)
    for _ in range(3):
        expected = handle.stock(PROMPT, **KWARGS)
        same_tensor(llama.generate(PROMPT, **KWARGS), expected)
        write()
    hf_paged.unpatch(llama)
    before = [parameter.clone() for parameter in llama.parameters()]
    write()
    changed = [not torch.equal(new, old) for new, old in zip(llama.parameters(), before, strict=True)]
    assert sum(changed) >= (len(changed) - 1 if owner not in (one_layer_only, twins) else 1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3_text", "mixtral", "gpt2"])
def test_storages_are_as_before(family: str) -> None:
    """Each parameter has one of its own again, of its own size, and the optimizer's parameters are the model's."""
    model = zoo.build(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    where, together, ids = storages(model), groups(model), list(map(id, model.parameters()))
    hf_paged.patch(model, **OPTIONS)
    model.generate(PROMPT, **KWARGS)
    hf_paged.unpatch(model)
    assert (storages(model), groups(model)) == (where, together)
    assert list(map(id, model.parameters())) == ids
    model(input_ids=PROMPT, labels=PROMPT).loss.backward()
    before = [parameter.clone() for parameter in model.parameters()]
    optimizer.step()
    gc.collect()
    assert any(not torch.equal(new, old) for new, old in zip(model.parameters(), before, strict=True))


def test_explain_says_why_layers_are_not_merged(llama: PreTrainedModel) -> None:
    flat_buffer(llama)
    assert "2 layers run as they are: something else uses the memory of its weights" in str(
        hf_paged.explain(llama, fusions=True)
    )


def test_sent_to_a_process_on_a_gpu_is_seen(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA memory that was sent to another process is noted in torch's own table, which is asked."""
    from torch.multiprocessing.reductions import StorageWeakRef, shared_cache

    from hf_paged.hf.fusion.storage import owns_its_storage

    weight = llama.model.layers[0].self_attn.k_proj.weight
    assert owns_its_storage(weight)
    shared_cache["a handle"] = StorageWeakRef(weight.untyped_storage())
    try:
        assert not owns_its_storage(weight)
    finally:
        del shared_cache["a handle"]
    assert owns_its_storage(weight)
