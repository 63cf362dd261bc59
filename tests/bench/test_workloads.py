"""The workloads are what they are said to be, to the token."""

from __future__ import annotations

import hashlib
import json
import random

import pytest

from hf_paged.bench import workloads
from hf_paged.errors import ConfigError


def test_a_is_the_ragged_workload():
    r = random.Random(0)
    lengths = [(r.randint(32, 1024), r.randint(32, 512)) for _ in range(512)]
    workload = workloads.load("A", vocab_size=128256)
    assert [(len(item.prompt_token_ids), item.max_tokens) for item in workload.items] == lengths
    assert (workload.prompt_tokens, workload.output_tokens) == (264_418, 143_016)
    ids = random.Random(1)
    assert workload.items[0].prompt_token_ids == [ids.randrange(128256) for _ in range(lengths[0][0])]


def test_a_fits_the_vocabulary():
    assert max(max(item.prompt_token_ids) for item in workloads.load("A", vocab_size=300).items) == 299


def test_cpu_is_the_ragged_workload_for_a_small_model():
    r = random.Random(0)
    expected = [([r.randrange(100, 49000) for _ in range(r.randint(16, 256))], r.randint(16, 128)) for _ in range(32)]
    workload = workloads.load("cpu", vocab_size=49152)
    assert [(item.prompt_token_ids, item.max_tokens) for item in workload.items] == expected
    assert workload.output_tokens == 2219


def test_workloads_do_not_change_from_run_to_run():
    first, second = (
        hashlib.sha256(json.dumps([[i.prompt_token_ids, i.max_tokens] for i in workloads.ragged().items]).encode())
        for _ in range(2)
    )
    assert first.hexdigest() == second.hexdigest()


def test_a_file_of_json_lines(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt_token_ids": [1, 2], "max_tokens": 3}\n\n{"prompt_token_ids": [4], "max_tokens": 1}\n')
    workload = workloads.load(str(path), vocab_size=5)
    assert workload.name == "mine.jsonl"
    assert workload.items == [workloads.Item([1, 2], 3), workloads.Item([4], 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no requests"),
        ("[1, 2]", r"mine:1 is not a request: '\[1, 2\]'"),
        ("nonsense", "mine:1 is not a request: 'nonsense'"),
        ('{"prompt_token_ids": [], "max_tokens": 3}', "mine:1 is not a request"),
        ('{"prompt_token_ids": [1, true], "max_tokens": 3}', "mine:1 is not a request"),
        ('{"prompt_token_ids": [1, -2], "max_tokens": 3}', "mine:1 is not a request"),
        ('{"prompt_token_ids": [1], "max_tokens": 0}', "mine:1 is not a request"),
        ('{"prompt_token_ids": [1], "max_tokens": 1}\n{}', "mine:2 is not a request"),
        ('{"prompt_token_ids": [9], "max_tokens": 1}', "has token id 9, but the model knows ids below 5"),
    ],
)
def test_a_bad_file_says_where(tmp_path, text, message):
    path = tmp_path / "mine"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        workloads.load(str(path), vocab_size=5)


def test_an_unknown_workload():
    with pytest.raises(ConfigError, match="'B' is neither A, cpu nor a file"):
        workloads.load("B", vocab_size=5)


def test_no_run_finds_anothers_prefixes():
    """Runs of one benchmark share an engine, and a prefix that is found there is not computed."""
    runs = [(shape, seed) for shape in workloads.UNIFORM.values() for seed in range(8)]
    begins = [tuple(item.prompt_token_ids[:16]) for shape, seed in runs for item in shape.items(1000, seed)]
    assert len(set(begins)) == len(begins)
