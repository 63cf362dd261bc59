"""Every code block of the migration guide runs, and the guide names every reason that the code has for falling back."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stock import nothing_left_patched
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast

import zoo
from hf_paged import PagedConfig

ROOT = Path(__file__).resolve().parent.parent
GUIDE = ROOT / "migration_guide"
# The README's own blocks run as well.
PAGES = {path.name: path for path in sorted(GUIDE.glob("*.md"))} | {"../README.md": ROOT / "README.md"}
FENCE = re.compile(r"^```(\w*)[ ]?([^\n]*)\n(.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
# Blocks that can't run in a test. A page that gets another one needs another number here.
NOT_RUN = {"from_a_web_handler.md": 2, "vllm.md": 1}
PORT = "8765"  # of servers in the guide; another run of the tests may use it at the same time
# The errors by which a call or a model falls back.
REFUSALS = ("Unsupported", "UnsupportedModelError")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, what follows on the line of the fence, its code, and the line it begins on."""

    language: str
    marker: str
    code: str
    line: int

    @property
    def runs(self) -> bool:
        return self.language == "python" and not self.marker.startswith("no-run")


def blocks(page: str) -> list[Block]:
    text = PAGES[page].read_text()
    return [Block(m[1], m[2], m[3], text.count("\n", 0, m.start(3))) for m in FENCE.finditer(text)]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A byte-level BPE as large as the zoo's vocabulary, trained on a text that never changes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    printable = byte_level.pre_tokenize_str("".join(map(chr, (10, *range(32, 127)))))
    trainer = trainers.BpeTrainer(
        vocab_size=zoo.VOCAB,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=sorted({character for text, _ in printable for character in text}),
        show_progress=False,
    )
    tokenizer.train_from_iterator([(ROOT / "LICENSE").read_text()], trainer)
    assert tokenizer.get_vocab_size() == zoo.VOCAB
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture
def tokenizer(tokenizer_file: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=tokenizer_file,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        chat_template=TEMPLATE,
    )


@pytest.fixture
def model() -> PreTrainedModel:
    return zoo.build("llama")


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Transformers as it was: a page that forgets an unpatch must not reach the next one."""
    generate = GenerationMixin.generate
    state = torch.get_rng_state()
    with nothing_left_patched(monkeypatch):
        yield
    torch.set_rng_state(state)
    assert GenerationMixin.generate is generate


@pytest.mark.parametrize("page", PAGES)
def test_every_block_runs(
    page: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    untouched: None,
) -> None:
    model.save_pretrained(tmp_path / "my-model")
    tokenizer.save_pretrained(tmp_path / "my-model")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__", "model": model, "tokenizer": tokenizer}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    printed = ""
    for block in blocks(page):
        if block.runs:
            if block.marker.startswith("title="):
                Path(block.marker.removeprefix("title=")).write_text(block.code)
            exec(compile(_raising(block, port), str(PAGES[page]), "exec"), namespace)
            printed = capsys.readouterr().out
        elif block.language == "sh":
            for line in block.code.splitlines():
                if line.startswith("python -m hf_paged "):
                    assert _run(line) == printed, f"{line}: prints something else than the script without hf_paged"


def _run(line: str) -> str:
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "plugins"))
    command = [sys.executable, *line.split()[1:]]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, env=environment).stdout


def _raising(block: Block, port: int) -> ast.Module:
    """The block's code, with a free port; a `try` of its own (not a function's) that raises nothing fails the test."""
    # Empty lines in front, so that a traceback names the line of the page.
    tree = ast.parse("\n" * block.line + block.code.replace(PORT, str(port)))
    for node in _tries(tree.body):
        node.orelse = ast.parse(f"raise AssertionError('line {node.lineno}: nothing was raised')").body
    return tree


def _tries(body: list[ast.stmt]) -> Iterator[ast.Try]:
    for node in body:
        if isinstance(node, ast.Try) and node.handlers and not node.orelse:
            yield node
        elif isinstance(node, ast.With):
            yield from _tries(node.body)


def test_blocks_that_do_not_run_say_why() -> None:
    found: dict[str, int] = {}
    for page in PAGES:
        for block in blocks(page):
            if block.language == "python" and block.marker.startswith("no-run"):
                found[page] = found.get(page, 0) + 1
                assert re.fullmatch(r"no-run: needs \S.*", block.marker), f"{page}:{block.line}: {block.marker!r}"
                compile(block.code, f"{page}:{block.line}", "exec")
            else:
                assert not block.marker or block.marker.startswith("title="), f"{page}:{block.line}: {block.marker!r}"
    assert found == NOT_RUN


def test_every_option_is_in_the_guide_with_its_default() -> None:
    section = (GUIDE / "from_a_script.md").read_text().split("## Options", 1)[1].split("\n## ", 1)[0]
    told = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", section, re.MULTILINE))
    assert told == {field.name: repr(field.default) for field in dataclasses.fields(PagedConfig)}


def test_every_page_has_code_and_is_in_the_index() -> None:
    index = (GUIDE / "README.md").read_text()
    for page in set(PAGES) - {"README.md", "../README.md"}:
        assert any(block.runs for block in blocks(page)), page
        assert f"({page})" in index, f"{page} is not in the index"


def test_links_lead_somewhere() -> None:
    for path in PAGES.values():
        for target, anchor in re.findall(r"\]\(([^)\s#]*)#?([^)]*)\)", FENCE.sub("", path.read_text())):
            if target.startswith(("http://", "https://")):
                continue
            there = path.parent / target if target else path
            assert there.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in _anchors(there), f"{path.name}: {target}#{anchor}"


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_reason_to_fall_back_is_in_the_guide() -> None:
    page = " ".join((GUIDE / "what_falls_back.md").read_text().split())
    missing = [text for text in _reasons() if text not in page]
    assert not missing, f"what_falls_back.md lacks {missing}"


def _reasons() -> list[str]:
    """Of each message that makes a call or a model fall back, the longest stretch without a value in it."""
    found = []
    for path in sorted((ROOT / "hf_paged" / "hf").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in REFUSALS:
                continue
            constants = [part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)]
            pieces = [value for value in constants if isinstance(value, str)]
            if pieces:
                found.append(" ".join(max(pieces, key=len).split()).strip(" :;,('\""))
    assert len(found) > 15
    return found
