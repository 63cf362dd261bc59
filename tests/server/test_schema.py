"""The served OpenAPI schema: what it says is so, and nothing that it allows breaks the server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from server.conftest import ServerProcess

schemathesis.checks.load_all_checks()
CHECKS = [
    schemathesis.checks.CHECKS.get_one(name)
    for name in (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
    )
]
EXAMPLES = 200 if os.environ.get("HF_PAGED_FULL") == "1" else 15


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("schema") / "log"
    options = ("--max-model-len", "48", "--max-num-seqs", "128", "--no-spare-engine", "--disable-log-requests")
    started = ServerProcess(tiny_model, log, "--served-model-name", "tiny", *options)
    yield started.wait_ready()
    assert started.stop() == 0
    assert "Traceback" not in started.text


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_nothing_breaks_the_server(server: ServerProcess, mode: schemathesis.GenerationMode) -> None:
    """Calls that the schema allows, and calls that it doesn't, to every route."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for found in schema.get_all_operations():
        _fuzz(found.ok(), mode)


def _fuzz(operation: Any, mode: schemathesis.GenerationMode) -> None:
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def fuzz(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, timeout=60)

    try:
        fuzz()
    except Unsatisfiable:  # a route without parameters has no wrong ones
        assert mode is schemathesis.GenerationMode.NEGATIVE


def test_the_schema_is_honest(server: ServerProcess) -> None:
    schema = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses"):
        responses = schema["paths"][path]["post"]["responses"]
        assert {"200", "400", "401", "404", "408", "413", "429", "500", "503"} <= set(responses)
        assert "text/event-stream" in responses["200"]["content"]
