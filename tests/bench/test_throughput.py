"""`hf-paged bench throughput`: same requests, same tokens, figures that add up."""

from __future__ import annotations

import json

import pytest
import torch

import zoo
from hf_paged import cli
from hf_paged.bench import engines, profile, report, static, throughput
from hf_paged.bench.run import KVUse, Run
from hf_paged.bench.workloads import Item
from hf_paged.engine.in_flight import SampledTokens

ITEMS = [Item(list(range(3, 3 + length)), tokens) for length, tokens in [(5, 9), (26, 4), (17, 12), (40, 1), (9, 20)]]


@pytest.fixture(scope="module")
def model():
    return zoo.build("llama")


@pytest.mark.parametrize("name", engines.ENGINES)
def test_every_engine_gives_the_tokens_asked_for_and_stock_ones(name, model):
    found = engines.measure(name, model, ITEMS, engines.Options(batch_size=2))
    assert [len(output) for output in found.outputs] == [item.max_tokens for item in ITEMS]
    assert found.outputs == [alone(model, item) for item in ITEMS]
    assert found.tokens == 46
    assert found.kv.used_tokens == sum(len(item.prompt_token_ids) + item.max_tokens - 1 for item in ITEMS)
    assert found.kv.reserved_tokens >= found.kv.used_tokens
    assert found.kv.peak_bytes > 0


@pytest.mark.parametrize("name", engines.ENGINES)
def test_every_engine_leaves_the_model_as_it_was(name, model):
    before = dict(vars(model)), model.config.to_dict(), model.config._attn_implementation
    engines.measure(name, model, ITEMS[:2], engines.Options())
    after = dict(vars(model)), model.config.to_dict(), model.config._attn_implementation
    after[0].pop("_cached_continuous_batching_manager", None)
    assert before == after


def alone(model, item: Item) -> list[int]:
    ids = torch.tensor([item.prompt_token_ids])
    row = model.generate(ids, max_new_tokens=item.max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return row[0, ids.shape[1] :].tolist()


def test_static_batches_reserve_for_their_longest_row(model):
    found = static.run(model, ITEMS, batch_size=2, pad=0)
    # (rows, longest prompt, longest output) of each batch
    assert found.kv.reserved_tokens == 2 * (26 + 9 - 1) + 2 * (40 + 12 - 1) + 1 * (9 + 20 - 1)
    per_token = 2 * sum(layer.self_attn.k_proj.out_features for layer in model.model.layers) * 4
    assert found.kv.peak_bytes == 2 * (40 + 12 - 1) * per_token


def test_only_useful_tokens_count(model):
    eos = frozenset([alone(model, ITEMS[2])[4]])
    found = static.run(model, ITEMS[2:3], batch_size=8, pad=0, eos=eos)
    assert found.outputs == [static.useful(alone(model, ITEMS[2]), eos)]
    assert found.tokens <= 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, {}), ("7", {"a": 7, "b": 7}), ("b=2", {"b": 2}), ("a=1,b=2", {"a": 1, "b": 2})],
)
def test_limit(text, expected):
    assert throughput.parse_limit(text, ["a", "b"]) == expected


def test_ratios_are_medians_of_neighbouring_runs():
    use = KVUse(100, 90, 1)
    ours = [Run(seconds, [[1] * 100], use) for seconds in (1.0, 2.0, 4.0)]
    theirs = [Run(seconds, [[1] * 50], use) for seconds in (1.0, 4.0, 2.0)]
    summary = report.summarise({"ours": ours, "theirs": theirs})
    assert summary["ratios"] == {"ours/theirs": 2.0}  # of 2, 4 and 1
    assert summary["engines"]["ours"]["median_tokens_per_second"] == 50.0
    assert summary["engines"]["ours"]["kv"]["waste"] == 0.1
    assert summary["engines"]["ours"]["kv"]["wasted_tokens"] == 10
    assert summary["identical"] == {"ours/theirs": "0/1"}


def test_the_last_line_is_json(model, tmp_path, capsys):
    folder, workload, copy = tmp_path / "model", tmp_path / "work.jsonl", tmp_path / "out.json"
    model.save_pretrained(folder)
    lines = [{"prompt_token_ids": item.prompt_token_ids, "max_tokens": item.max_tokens} for item in ITEMS]
    workload.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["bench", "throughput", "--engine", "hf_paged", "--engine", "generate", "--workload", str(workload)]
    arguments += ["--model", str(folder), "--repeats", "2", "--limit", "generate=3", "--json", str(copy)]
    assert cli.main(arguments) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    found = json.loads(last)
    assert copy.read_text() == last + "\n"
    assert found["output_tokens"] == found["engines"]["hf_paged"]["useful_tokens"] == 46
    assert found["engines"]["generate"]["requests"] == 3
    assert found["identical"] == {"hf_paged/generate": "3/3"}
    assert len(found["engines"]["hf_paged"]["tokens_per_second"]) == 2
    assert found["environment"]["model"] == str(folder)
    assert found["environment"]["torch"] == torch.__version__


def test_a_profile_of_some_steps(model, tmp_path):
    items = [Item(list(range(3, 9)), 40), Item(list(range(9, 20)), 50)]
    found = profile.run(model, items, {}, tmp_path / "trace.json")
    assert found["steps"] == 50 - profile.FIRST  # the run was over before the window was
    assert found["gpu_busy"] is None
    assert found["wall_ms"] == pytest.approx(sum(found["host_ms"].values()), rel=1e-2)
    assert found["host_ms"]["launch the forward"] > found["host_ms"]["schedule"] > 0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
    assert "wait" in vars(SampledTokens)  # put back
