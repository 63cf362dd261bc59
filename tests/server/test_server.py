"""What surrounds generation: keys, limits, deadlines, clients that leave, and the server's life."""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from server import fakes, load
from server.conftest import ServerProcess, events

from hf_paged import ConfigError, cli
from hf_paged.server.commands import server_config
from hf_paged.server.config import ServerConfig
from hf_paged.server.serve import serve as run_server

LONG = {"prompt": [5, 6, 7], "max_tokens": 400, "ignore_eos": True, "temperature": 0}


def post(server: ServerProcess, path: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=60, **options)


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


# ---------------------------------------------------------------------------------------------------- what is refused


def test_request_ids(tiny_server: ServerProcess) -> None:
    given = httpx.get(tiny_server.url + "/v1/models", headers={"X-Request-Id": "abc-1"}, timeout=60)
    assert given.headers["x-request-id"] == "abc-1"
    made = httpx.get(tiny_server.url + "/v1/models", headers={"X-Request-Id": "with space"}, timeout=60)
    assert len(made.headers["x-request-id"]) == 32
    assert tiny_server.logged("request_id=abc-1 .*client=127.0.0.1")
    called = {"prompt": "x", "max_tokens": 1, "request_id": "mine", "user": "somebody"}
    named = post(tiny_server, "/v1/completions", called)
    assert tiny_server.logged("finished client_id=mine .* user=somebody prompt_tokens=1 ")
    assert named.json()["id"] == "cmpl-mine"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "x", "nope": 1}, "nope"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": "x", "best_of": 2}, "best_of"),
        ({"prompt": "x", "store": "yes"}, "store"),
        ({"prompt": "x", "temperature": "1"}, "temperature"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "x", "stop": [""]}, "stop"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
        ({"prompt": "x", "logprobs": 21}, "logprobs"),
        ({"prompt": "x", "priority": 1}, "priority"),
        ({"prompt": "x", "min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x", "stream_options": {"what": True}}, "stream_options.what"),
        ({"prompt": "x", "response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ],
)
def test_fields_that_are_not_honoured(tiny_server: ServerProcess, body: dict[str, Any], param: str) -> None:
    response = post(tiny_server, "/v1/completions", body)
    assert response.status_code == 400
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [], "tool_choice": "required"}, None),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"chat_template": "x"}, "chat_template"),
        ({"reasoning_effort": "lots"}, "reasoning_effort"),
        ({"top_logprobs": 2}, None),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
    ],
)
def test_fields_of_chat_that_are_not_honoured(
    tiny_server: ServerProcess, body: dict[str, Any], param: str | None
) -> None:
    response = post(tiny_server, "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], **body})
    assert response.status_code == 400
    assert (error_of(response)["param"] or "").startswith(param or "")


def test_other_errors_have_the_same_body(tiny_server: ServerProcess) -> None:
    assert error_of(httpx.get(tiny_server.url + "/nothing", timeout=60))["type"] == "not_found_error"
    assert httpx.get(tiny_server.url + "/v1/completions", timeout=60).status_code == 405
    plain = httpx.post(tiny_server.url + "/v1/completions", content=b'{"prompt": "x"}', timeout=60)
    assert plain.status_code == 400
    assert "Content-Type: application/json" in error_of(plain)["message"]
    broken = httpx.post(tiny_server.url + "/v1/completions", content=b"{", timeout=60)
    assert (broken.status_code, error_of(broken)["type"]) == (400, "invalid_request_error")
    assert post(tiny_server, "/v1/completions", {"prompt": "x", "model": "other"}).status_code == 404


def test_keys_guard_everything_but_the_probes() -> None:
    app = fakes.application(fakes.FakeEngine(), api_keys=("one", "two"))
    for path in ("/v1/models", "/version", "/metrics", "/", "/docs", "/openapi.json", "/nothing"):
        response = fakes.call(app, "GET", path)
        assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key"), path
        assert "x-request-id" in response.headers
    for path in ("/health", "/ready"):
        assert fakes.call(app, "GET", path).status_code == 200
    for key, status in (("one", 200), ("two", 200), ("ONE", 401), ("one two", 401), ("", 401)):
        headers = {"Authorization": f"Bearer {key}".strip(), "Origin": "https://example.org"}
        response = fakes.call(app, "GET", "/v1/models", headers=headers)
        assert response.status_code == status
        assert "access-control-allow-origin" not in response.headers
    assert fakes.call(app, "GET", "/v1/models", headers={"Authorization": "Basic one"}).status_code == 401


def test_probes_are_open_below_a_root_path_too() -> None:
    app = fakes.application(fakes.FakeEngine(), api_keys=("one",), root_path="/below")
    for path, status in (("/health", 200), ("/ready", 200), ("/below/health", 200), ("/below/ready", 200)):
        assert fakes.call(app, "GET", path).status_code == status, path
    for path in ("/below/v1/models", "/below/below/health", "/elsewhere/health"):
        assert fakes.call(app, "GET", path).status_code == 401, path


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "[::1]", "gpu-box", None])
def test_names_of_a_server_without_keys(host: str | None) -> None:
    app = fakes.application(fakes.FakeEngine(), allowed_hosts=("gpu-box",))
    headers = {} if host is None else {"Host": host}
    assert fakes.call(app, "GET", "/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "evil.example:8000", "[::2]", "", "a:b:c"])
def test_other_names_are_refused(host: str) -> None:
    """A page of another site could have its name point to this machine, and read the answers."""
    response = fakes.call(fakes.application(fakes.FakeEngine()), "GET", "/v1/models", headers={"Host": host})
    assert (response.status_code, error_of(response)["code"]) == (403, "host_not_allowed")
    assert (
        fakes.call(fakes.application(fakes.FakeEngine()), "GET", "/health", headers={"Host": host}).status_code == 200
    )
    for options in ({"allowed_hosts": ("*",)}, {"api_keys": ("k",)}, {"host": "0.0.0.0", "allow_no_key": True}):
        headers = {"Host": host, "Authorization": "Bearer k"}
        app = fakes.application(fakes.FakeEngine(), **options)
        assert fakes.call(app, "GET", "/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "example.org", ""])
def test_other_machines_need_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="lets other machines in, and there is no API key"):
        ServerConfig(model="m", host=host)
    ServerConfig(model="m", host=host, api_keys=("k",))
    ServerConfig(model="m", host=host, allow_no_key=True)


@pytest.mark.parametrize("keys", [("one",), ("one", "two")])
def test_prompts_of_each_key_have_a_cache_of_their_own(keys: tuple[str, ...]) -> None:
    engine = fakes.FakeEngine()
    app = fakes.application(engine, api_keys=keys)
    for key in keys:
        for salt in ({}, {"cache_salt": "s"}):
            body = {"prompt": "x", **salt}
            fakes.call(app, "POST", "/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})
    found = [one.cache_key for one in engine.asked]
    assert found == ([None, "s"] if len(keys) == 1 else ["1:", "1:s", "2:", "2:s"])


def test_keys_from_arguments_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, none = tmp_path / "keys", tmp_path / "none"
    file.write_bytes(b"\xef\xbb\xbf# for tests\r\n  # more\r\n\r\n file-key \r\nfile-key\r\n")
    none.write_text("# nothing\n")

    def keys(*arguments: str) -> tuple[str, ...]:
        return server_config(cli.build_parser().parse_args(["serve", "model", *arguments])).api_keys

    assert keys() == ()
    assert keys("--api-key", "a", "--api-key", "b", "--api-key-file", str(file)) == ("a", "b", "file-key")
    monkeypatch.setenv("HF_PAGED_API_KEY", "x,y")
    assert keys() == ("x", "y")
    monkeypatch.setenv("HF_PAGED_API_KEY", " x , ,y\n")
    assert keys() == ("x", "y")
    with pytest.raises(ConfigError, match="holds no key"):
        keys("--api-key-file", str(none))
    for nothing in ("", " ", ",", "\n"):
        monkeypatch.setenv("HF_PAGED_API_KEY", nothing)
        with pytest.raises(ConfigError, match="the environment variable HF_PAGED_API_KEY holds no key"):
            keys()
        with pytest.raises(ConfigError, match="an API key is empty"):
            keys("--api-key", nothing.strip(","))
    for wrong in ("ü", "a b", "a\tb", "a\x00"):
        with pytest.raises(ConfigError, match="other characters than printable ASCII") as caught:
            keys("--api-key", wrong)
        assert wrong not in str(caught.value)
    none.write_bytes(b"caf\xe9\n")
    with pytest.raises(ConfigError, match="isn't UTF-8: byte 3 is 0xe9"):
        keys("--api-key-file", str(none))
    with pytest.raises(ConfigError, match="can't be read"):
        keys("--api-key-file", str(tmp_path))


def test_bodies_that_are_too_large() -> None:
    app = fakes.application(fakes.FakeEngine(), max_body_bytes=2000)
    assert fakes.call(app, "POST", "/v1/completions", json={"prompt": "x"}).status_code == 200

    async def chunks() -> Any:
        for _ in range(3):
            yield b"x" * 1500

    for options in ({"json": {"prompt": "x" * 3000}}, {"content": chunks()}):
        large = fakes.call(app, "POST", "/v1/completions", **options)
        assert (large.status_code, error_of(large)["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("most", "asked", "taken"),
    [(20, -1, False), (20, 20, True), (5, 6, False), (5, -1, False), (5, 5, True), (0, 0, True), (-1, -1, True)],
)
def test_log_probabilities_are_bounded(most: int, asked: int, taken: bool) -> None:
    app = fakes.application(fakes.FakeEngine(), max_logprobs=most)
    response = fakes.call(app, "POST", "/v1/completions", json={"prompt": "x", "prompt_logprobs": asked})
    assert response.status_code == (200 if taken else 400)
    if not taken:
        assert error_of(response)["param"] == "prompt_logprobs"
        assert f"outside 0 to {most}" in error_of(response)["message"]


def test_cors_where_it_is_wanted() -> None:
    app = fakes.application(fakes.FakeEngine(), cors_origins=("https://example.org",))
    for origin, allowed in (("https://example.org", True), ("https://other.org", False)):
        response = fakes.call(app, "GET", "/v1/models", headers={"Origin": origin})
        assert (response.headers.get("access-control-allow-origin") == origin) is allowed


def test_unexpected_errors_have_a_body_too() -> None:
    engine = fakes.FakeEngine()
    engine.submit = lambda group: 1 / 0  # type: ignore[method-assign]
    response = fakes.call(fakes.application(engine), "POST", "/v1/completions", json={"prompt": "x"})
    assert (response.status_code, error_of(response)["type"]) == (500, "server_error")
    assert response.headers["x-request-id"] in error_of(response)["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("finish", "status"), [("deadline", 408), ("queue_timeout", 429), ("abort", 503), ("error", 500)]
)
def test_what_ends_badly(finish: str, status: int, stream: bool) -> None:
    engine = fakes.FakeEngine("")
    engine.finish = finish
    body = {"prompt": "x", "stream": stream}
    response = fakes.call(fakes.application(engine), "POST", "/v1/completions", json=body)
    assert response.status_code == status
    assert error_of(response)["code"]


# ------------------------------------------------------------------------------------------------- deadlines, leaving


def test_deadline(tiny_server: ServerProcess) -> None:
    late = post(tiny_server, "/v1/completions", {**LONG, "timeout": 0.05})
    assert (late.status_code, error_of(late)["code"]) == (408, "deadline_exceeded")
    for seconds in (0.3, 1.0, 3.0, 10.0):  # on a busy machine the first token may come later than the deadline
        body = {**LONG, "n": 16, "temperature": 1, "timeout": seconds, "stream": True}
        response = post(tiny_server, "/v1/completions", body)
        if response.status_code == 200:
            break
    assert events(response.text)[-1]["error"]["code"] == "deadline_exceeded"
    assert load.until_idle(tiny_server.url)


def test_a_client_that_leaves_frees_its_blocks(tiny_server: ServerProcess) -> None:
    for stream in (True, False):
        body = {**LONG, "n": 4, "temperature": 1, "stream": stream}
        with (
            pytest.raises((httpx.ReadTimeout, TimeoutError)),
            httpx.stream("POST", tiny_server.url + "/v1/completions", json=body, timeout=0.3) as response,
        ):
            for _ in response.iter_bytes():
                raise TimeoutError
    assert load.until_idle(tiny_server.url)


def test_stream_fails_with_a_status_before_its_first_token(tiny_server: ServerProcess) -> None:
    response = post(tiny_server, "/v1/completions", {**LONG, "timeout": 0.001, "stream": True})
    assert (response.status_code, error_of(response)["code"]) == (408, "deadline_exceeded")


# ---------------------------------------------------------------------------------------------------------------- life


def test_sigterm_drains(serve: Callable[..., ServerProcess]) -> None:
    """What was accepted completes, what is new is refused, and the exit status is 0."""
    server = serve("--no-spare-engine", "--max-num-seqs", "4").wait_ready()
    calls = load.bodies(12, longest=400)
    outcomes: list[load.Outcome] = []
    running = threading.Thread(target=lambda: outcomes.extend(asyncio.run(load.all_streams(server.url, calls))))
    running.start()
    until = time.monotonic() + 120
    while load.seen(server.url) < len(calls):
        assert time.monotonic() < until
        time.sleep(0.02)
    server.signal(signal.SIGTERM)
    time.sleep(0.1)
    refused = post(server, "/v1/completions", {"prompt": "x"})
    assert (refused.status_code, error_of(refused)["code"]) == (503, "draining")
    assert "retry-after" in refused.headers
    assert httpx.get(server.url + "/ready", timeout=60).status_code == 503
    assert httpx.get(server.url + "/health", timeout=60).status_code == 200
    running.join(300)
    assert [outcome.error for outcome in outcomes] == [None] * 12
    assert [len(outcome.tokens) for outcome in outcomes] == [body["max_tokens"] for body in calls]
    assert server.process.wait(120) == 0


def test_a_second_signal_aborts(serve: Callable[..., ServerProcess]) -> None:
    """Also: what a server that starts says, and that structured logs are JSON."""
    server = serve("--no-spare-engine", "--log-format", "json")
    server.wait_listening()
    assert httpx.get(server.url + "/health", timeout=60).status_code == 200
    assert httpx.get(server.url + "/ready", timeout=60).status_code == 503
    early = post(server, "/v1/completions", {"prompt": "x"})
    assert (early.status_code, error_of(early)["code"]) == (503, "not_ready")
    server.wait_ready()
    got: list[str] = []
    body = {**LONG, "max_tokens": 500, "stream": True, "n": 16, "temperature": 1}
    client = threading.Thread(target=_read, args=(server.url, body, got))
    client.start()
    while not got:
        time.sleep(0.01)
    for _ in range(2):
        server.signal(signal.SIGTERM)
        time.sleep(0.1)
    assert server.process.wait(60) == 130
    client.join(10)
    lines = [json.loads(line) for line in server.text.splitlines() if line.startswith("{")]
    assert any(line.get("path") == "/v1/completions" and line["status"] == 503 for line in lines)


def test_the_drain_ends_in_time(serve: Callable[..., ServerProcess]) -> None:
    server = serve("--no-spare-engine", "--drain-timeout", "0.2").wait_ready()
    got: list[str] = []
    body = {**LONG, "max_tokens": 500, "stream": True, "n": 32, "temperature": 1}
    client = threading.Thread(target=_read, args=(server.url, body, got))
    client.start()
    while not got:
        time.sleep(0.01)
    server.signal(signal.SIGTERM)
    assert server.process.wait(15) == 0
    client.join(10)
    assert "the server is shutting down" in "".join(got)


def _read(url: str, body: Any, got: list[str]) -> None:
    try:
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as response:
            got.extend(response.iter_lines())
    except httpx.HTTPError as error:
        got.append(repr(error))


def test_a_model_that_is_not_there(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    server = serve("--no-spare-engine", model=tmp_path / "nothing")
    assert server.process.wait(120) == 2
    assert "hf-paged: error: " in server.text


def test_tls(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    try:
        done = subprocess.run(
            [*command, "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("there is no openssl to make a certificate with")
    assert done.returncode == 0
    locked, none = tmp_path / "locked.pem", tmp_path / "none.pem"
    subprocess.run(
        ["openssl", "rsa", "-aes128", "-passout", "pass:x", "-in", str(key), "-out", str(locked)], check=True
    )
    for files, message in (
        ((none, certificate), "No such file or directory"),
        ((key, key), "TLS can't use"),
        ((certificate, certificate), "TLS can't use"),
        ((locked, certificate), "has a password"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_server(ServerConfig(model="m", ssl_keyfile=str(files[0]), ssl_certfile=str(files[1])))
    server = serve("--no-spare-engine", "--ssl-keyfile", str(key), "--ssl-certfile", str(certificate))
    server.wait_listening()
    context = ssl.create_default_context(cafile=str(certificate))
    until = time.monotonic() + 120
    while True:
        try:
            assert httpx.get(f"https://127.0.0.1:{server.port}/health", verify=context, timeout=60).status_code == 200
            break
        except httpx.TransportError:
            assert time.monotonic() < until
    assert server.stop() == 0
