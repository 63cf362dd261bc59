"""The public functions refuse what they can't do, and pass through torch.library, torch.compile and fake tensors."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def decode_arguments(kit):
    import hf_paged_kernels as kernels

    case = kit.case([5, 20], device=DEVICE)
    size = kernels.decode_workspace_bytes(2, 4, case.k_cache, case.v_cache)
    workspace = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    return {
        "query": case.query, "k_cache": case.k_cache, "v_cache": case.v_cache, "block_tables": case.block_tables,
        "seq_lens": case.seq_lens, "workspace": workspace, "scale": 0.2,
    }  # fmt: skip


ILLEGAL = {
    "query of another dtype": ("query", lambda x: x.half(), TypeError),
    "query of integers": ("query", lambda x: x.long(), TypeError),
    "query without heads": ("query", lambda x: x[:, 0], ValueError),
    "query of another head dim": ("query", lambda x: x[..., :16], ValueError),
    "query not contiguous within a head": (
        "query",
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        ValueError,
    ),
    "heads no multiple": ("query", lambda x: x[:, :3], ValueError),
    "cache with pages of 8": ("k_cache", lambda x: x[:, :8], ValueError),
    "value cache of another dtype": ("v_cache", lambda x: x.half(), TypeError),
    "value cache of other blocks": ("v_cache", lambda x: x[1:], ValueError),
    "tables of int64": ("block_tables", lambda x: x.long(), TypeError),
    "tables of too few rows": ("block_tables", lambda x: x[:1], ValueError),
    "lengths of int64": ("seq_lens", lambda x: x.long(), TypeError),
    "lengths strided": ("seq_lens", lambda x: x.repeat_interleave(2)[::2], ValueError),
    "workspace too small": ("workspace", lambda x: x[:-512], ValueError),
    "workspace missing": ("workspace", lambda x: None, TypeError),
    "scale of zero": ("scale", lambda x: 0.0, ValueError),
    "window negative": ("window", lambda x: -1, ValueError),
    "soft-cap negative": ("softcap", lambda x: -1.0, ValueError),
    "sinks of another size": ("sinks", lambda x: torch.zeros(3, device=DEVICE), ValueError),
    "scales without an fp8 cache": ("k_scale", lambda x: torch.ones(1, device=DEVICE), ValueError),
    "impl unknown": ("impl", lambda x: "cuda", ValueError),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_illegal_arguments_are_refused(kit, name):
    """The message names the argument; nothing is computed."""
    import hf_paged_kernels as kernels

    argument, change, error = ILLEGAL[name]
    arguments = decode_arguments(kit)
    arguments[argument] = change(arguments.get(argument))
    word = "k_cache|v_cache" if argument == "k_cache" else argument
    with pytest.raises(error, match=word):
        kernels.decode_attention(**arguments)


@pytest.mark.parametrize("value", [10**6, -1])
def test_block_ids_out_of_range_are_found_in_debug_mode(kit, value):
    import hf_paged_kernels as kernels

    arguments = decode_arguments(kit)
    arguments["block_tables"][1, 1] = value
    with pytest.raises(ValueError, match=r"block_tables\[1, 1\]"):
        kernels.decode_attention(**arguments, debug=True)
    arguments["seq_lens"][0] = 10**6
    with pytest.raises(ValueError, match=r"seq_lens\[0\]"):
        kernels.decode_attention(**arguments, debug=True)


def test_slots_are_checked_in_debug_mode():
    import hf_paged_kernels as kernels

    key, cache = torch.zeros(2, 2, 32, device=DEVICE), torch.zeros(3, 16, 2, 32, device=DEVICE)
    for slots in ([1, 48], [5, 5]):
        with pytest.raises(ValueError, match="slot_mapping"):
            kernels.write_cache(key, key, cache, cache.clone(), torch.tensor(slots, device=DEVICE), debug=True)


def test_query_starts_are_checked_in_debug_mode(kit):
    import hf_paged_kernels as kernels

    case = kit.case([5, 20], query_lens=[5, 6], device=DEVICE)
    for starts, lens in (([0, 6, 5], [5, 20]), ([0, 5, 12], [5, 20]), ([0, 5, 11], [4, 20])):
        with pytest.raises(ValueError, match=r"query_start_loc|seq_lens"):
            kernels.prefill_attention(
                case.query, case.k_cache, case.v_cache, torch.tensor(starts, dtype=torch.int32, device=DEVICE),
                seq_lens=torch.tensor(lens, dtype=torch.int32, device=DEVICE), block_tables=case.block_tables,
                scale=1.0, debug=True,
            )  # fmt: skip


def test_triton_on_cpu_needs_the_interpreter(monkeypatch):
    import hf_paged_kernels as kernels

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="impl"):
        kernels.argmax(torch.zeros(2, 3))
    assert kernels.argmax(torch.zeros(2, 3), impl="torch").tolist() == [0, 0]


def test_custom_ops(kit):
    """Schemas, fakes and functionalization of every op."""
    import hf_paged_kernels as kernels

    def check(op, *arguments):
        torch.library.opcheck(op.op, arguments, test_utils=("test_schema", "test_faketensor"))

    a = decode_arguments(kit)
    query, table, lens = a["query"], a["block_tables"], a["seq_lens"]
    caches, out, plain = (a["k_cache"], a["v_cache"]), torch.empty_like(query), (0, 0.0, None, None, None, None)
    check(kernels.plan_decode, lens, a["workspace"], *caches, 0)
    check(kernels.decode_attention, query, *caches, table, lens, a["workspace"], 0.2, out, *plain, False)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE)
    check(kernels.prefill_attention, query, *caches, starts, 0.2, lens, table, out, *plain, False)
    key, slots = torch.randn(2, 2, 32, device=DEVICE), torch.tensor([3, 17], device=DEVICE)
    cos = torch.randn(2, 16, device=DEVICE)
    copies = (cache.clone() for cache in caches)
    rotary = (slots, cos, cos.clone(), out, None, False)
    check(kernels.write_cache, query, key, key.clone(), *copies, *rotary, None, None)
    x = torch.randn(3, 64, device=DEVICE)
    check(kernels.rms_norm, x, x[0].clone(), x.clone(), torch.empty_like(x), 1e-6, False, False)
    check(kernels.gated_activation, x, x.clone(), torch.empty_like(x), "silu")
    token, row = torch.empty(3, dtype=torch.int64, device=DEVICE), torch.ones(3, device=DEVICE)
    check(kernels.argmax, x, token)
    check(kernels.sample, x, token, row, row.long() * 2, row.long() * 3, row.int(), row * 0.5, row * 0.1)


@pytest.mark.parametrize("name", ["rms_norm", "gated_activation", "linear", "argmax", "sample", "write_cache"])
def test_a_public_function_has_the_signature_that_it_was_written_with(name):
    """What the decorator generates refuses unknown arguments, and keeps types, defaults and documentation."""
    import inspect

    import hf_paged_kernels as kernels

    function = getattr(kernels, name)
    generated = inspect.signature(function, follow_wrapped=False).parameters.values()
    written = inspect.signature(function).parameters.values()
    assert [(p.name, p.kind, p.default) for p in generated] == [(p.name, p.kind, p.default) for p in written]
    assert all(p.annotation is not p.empty for p in written)
    assert function.__doc__
    with pytest.raises(TypeError, match="bias_of_another_name"):
        function(bias_of_another_name=1)


def test_what_is_written_is_returned(kit):
    """`out` where it was given or not, the rotated query of a cache write, the workspace of a plan."""
    import hf_paged_kernels as kernels

    x = torch.randn(3, 64, device=DEVICE)
    out = torch.empty_like(x)
    for impl in ("triton", "torch"):
        assert kernels.gated_activation(x, x, out=out, impl=impl) is out
        assert torch.equal(kernels.gated_activation(x, x, impl=impl), out)
    a = decode_arguments(kit)
    caches = a["k_cache"], a["v_cache"]
    assert kernels.plan_decode(a["seq_lens"], a["workspace"], *caches) is a["workspace"]
    key, slots = torch.randn(2, 2, 32, device=DEVICE), torch.tensor([3, 17], device=DEVICE)
    cos, query = torch.randn(2, 16, device=DEVICE), a["query"]
    assert kernels.write_cache(key, key.clone(), *caches, slots) is None
    assert kernels.write_cache(key, key.clone(), *caches, slots, query=query, cos=cos, sin=cos) is query


def test_compiles_without_graph_breaks():
    """torch.compile traces through the checks and the op, here with the backend that compiles nothing."""
    import hf_paged_kernels as kernels

    x, w = torch.randn(4, 64, device=DEVICE), torch.randn(64, device=DEVICE)

    def layer(x, w):
        return kernels.gated_activation(kernels.rms_norm(x, w, eps=1e-6), x)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, w), layer(x, w))


def test_imports_torch_and_triton_alone():
    """The package's floor: nothing of transformers, of hf_paged, or of a compiled extension."""
    import ast
    import sys
    from pathlib import Path

    import hf_paged_kernels

    allowed = {"torch", "triton", "hf_paged_kernels"} | set(sys.stdlib_module_names)
    for path in Path(hf_paged_kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name} imports {name}"
    assert not (Path(hf_paged_kernels.__file__).parent.parent / "__init__.py").exists()


def test_ops_are_called_where_something_looks_on(monkeypatch):
    """Autograd, a compiler and dispatch modes see the op; other calls don't wait for its dispatch."""
    import hf_paged_kernels as kernels

    called, op = [], kernels.rms_norm.op
    monkeypatch.setitem(kernels.rms_norm.__globals__, "custom", lambda *args: called.append("op") or op(*args))
    x, weight = torch.randn(3, 64, device=DEVICE), torch.ones(64, device=DEVICE)
    with_grad = kernels.rms_norm(x, weight, eps=1e-6)
    assert called == ["op"]
    with torch.no_grad():
        torch.testing.assert_close(kernels.rms_norm(x, weight, eps=1e-6), with_grad)
        assert called == ["op"]
        with FlopCounterMode(display=False):
            kernels.rms_norm(x, weight, eps=1e-6)
    assert called == ["op", "op"]
    compiled = torch.compile(lambda x: kernels.rms_norm(x, weight, eps=1e-6), backend="aot_eager", fullgraph=True)
    monkeypatch.undo()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), with_grad)
