"""`hf-paged bench soak`: it counts right, and a wrong answer is seen."""

from __future__ import annotations

import json

import pytest

from hf_paged import cli
from hf_paged.bench import soak
from hf_paged.engine.engine import Engine
from hf_paged.request import Request

COMMAND = ["bench", "soak", "--requests", "60", "--in-flight", "12", "--cancel", "0.3", "--device", "cpu"]


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "PROMPTS", 6)


def summary(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_answers_blocks_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(COMMAND) == 0
    found = summary(capsys)
    assert found["finished"] + found["cancelled"] == 60
    assert found["cancelled"] > 5
    assert found["preemptions"] > 0
    assert {found[name] for name in ("wrong", "failed", "lost", "blocks_leaked")} == {0}
    assert len(found["memory_mib"]["host"]) == soak.SAMPLES
    assert found["tokens"] > 60


def test_a_wrong_answer_is_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = soak.Soak._alone

    def last_token_changed(self: soak.Soak, prompt: list[int]) -> list[int]:
        answer = real(self, prompt)
        return [*answer[:5], answer[5] ^ 1, *answer[6:]]

    monkeypatch.setattr(soak.Soak, "_alone", last_token_changed)
    assert cli.main(COMMAND) == 1
    assert summary(capsys)["wrong"] > 0


def test_a_request_that_the_engine_forgets_is_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Engine.add

    def add(self: Engine, request: Request) -> None:
        if not request.request_id.startswith("7/"):
            real(self, request)

    monkeypatch.setattr(Engine, "add", add)
    assert cli.main(COMMAND) == 1
    assert summary(capsys)["lost"] == 1


def test_a_share_is_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "soak", "--cancel", "7"])
    assert "between 0 and 1, got '7'" in capsys.readouterr().err


@pytest.mark.parametrize(("seen", "flat"), [([100, 101, 100, 101], True), ([100, 101, 200, 300], False), ([5], True)])
def test_flat(seen: list[int], flat: bool) -> None:
    assert soak._is_flat([x * 2**20 for x in seen]) == flat
