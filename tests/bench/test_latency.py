"""`hf-paged bench latency`: what it times, on a tiny model and shapes that suit it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import zoo
from hf_paged import cli
from hf_paged.bench import latency
from hf_paged.bench.workloads import Uniform

SHAPES = {"B": Uniform(1, 12, 6), "E": Uniform(2, 20, 1)}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(latency, "UNIFORM", SHAPES)
    zoo.build("llama").save_pretrained(tmp_path)
    return str(tmp_path)


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert cli.main(["bench", "latency", "--device", "cpu", "--repeats", "2", *arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("engine", ["hf_paged", "patched"])
def test_steps_and_prompts(model: str, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(capsys, "--model", model, "--workload", "B,E", "--engine", engine)
    assert {name: value["unit"] for name, value in found["workloads"].items()} == {"B": "ms/step", "E": "prompt tok/s"}
    assert all(len(value["runs"]) == 2 for value in found["workloads"].values())
    assert found["workloads"]["E"]["median"] > 0
    assert (found["seconds_to_first_token"] is None) == (engine == "patched")


def test_the_first_token_alone(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = measured(capsys, "--model", model, "--workload", "none")
    assert found["workloads"] == {}
    assert found["seconds_to_first_token"] > 0


def test_what_would_be_ignored_is_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "latency", "--model", model, "--workload", "none", "--engine", "patched"]) == 2
    assert "of --engine patched there is nothing to time" in capsys.readouterr().err
    assert cli.main(["bench", "latency", "--dtype", "float32", "--workload", "B"]) == 2
    assert "--dtype float32: the random 8B model is in bfloat16" in capsys.readouterr().err


def test_an_unknown_workload_is_named(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "latency", "--model", model, "--workload", "B,Z"]) == 2
    assert "unknown workload 'Z'; known are B, E" in capsys.readouterr().err
