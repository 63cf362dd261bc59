"""`hf-paged chat`, in the terminal."""

from __future__ import annotations

import io

import httpx
import pytest
from rich.console import Console
from server.conftest import ServerProcess

from hf_paged import HFPagedError, cli
from hf_paged.server import chat_client
from hf_paged.server.chat_client import Conversation


def test_one_message(tiny_server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["chat", "hello", "--url", tiny_server.url, "--temperature", "0", "--max-tokens", "8", "--system", "be"]
    assert cli.main(arguments) == 0
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hello"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 8}
    answer = httpx.post(tiny_server.url + "/v1/chat/completions", json=body, timeout=60).json()
    assert capsys.readouterr().out.strip() == answer["choices"][0]["message"]["content"].strip()


def test_a_conversation(
    tiny_server: ServerProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n/help\n/system x\ntwo\n/undo\n/reset\n/quit\nnever\n"))
    assert cli.main(["chat", "--url", tiny_server.url, "--max-tokens", "4", "--seed", "1"]) == 0
    assert "/reset begins anew" in capsys.readouterr().out


def test_turns(tiny_server: ServerProcess) -> None:
    with httpx.Client(base_url=tiny_server.url) as client:
        talk = Conversation(client, "tiny", {"max_tokens": 4, "temperature": 0, "ignore_eos": True})
        first = "".join(talk.say("a"))
        assert [message["role"] for message in talk.messages] == ["user", "assistant"]
        assert talk.messages[1]["content"] == first
        talk.set_system("s")
        "".join(talk.say("b"))
        assert [message["role"] for message in talk.messages] == ["system", *["user", "assistant"] * 2]
        talk.undo()
        assert len(talk.messages) == 3
        talk.reset()
        assert talk.messages == [{"role": "system", "content": "s"}]
        wrong = Conversation(client, "other", {})
        with pytest.raises(HFPagedError, match="not served"):
            "".join(wrong.say("a"))
        assert wrong.messages == []


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "x", "--url", "http://127.0.0.1:9"]) == 2
    assert "no server answers" in capsys.readouterr().err


def test_control_codes_of_an_answer_are_shown_and_not_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal; into a file an answer goes as it is."""
    said = "a\x1b[2J\u202eb\n\tc"
    for terminal, expected in ((True, "a\\x1b[2J\\u202eb\n\tc\n"), (False, said + "\n")):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal)
        talk = Conversation(httpx.Client(), "m", {})
        monkeypatch.setattr(talk, "say", lambda text: iter([said]))
        chat_client._answer(console, talk, "x")
        assert out.getvalue().expandtabs() == expected.expandtabs()
