"""Releases of Transformers: what differs between them, and that a seam which broke is never off in silence."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import tiny
import torch
import transformers
from stock import caught, padded, same_tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel

import hf_paged
import zoo
from hf_paged import cli
from hf_paged.hf import compat, seam

BATCH = padded(zoo.prompts(2, (9, 4)))
KWARGS: dict[str, Any] = dict(max_new_tokens=5, do_sample=False)


def rename_a_keyword(monkeypatch: pytest.MonkeyPatch) -> str:
    """As 5.24 did with the cache: the preparation hands it to the forward under another name."""
    original = GenerationMixin._prepare_cache_for_generation

    def renamed(self: Any, config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        original(self, config, model_kwargs, *args)
        model_kwargs["kv_store"] = model_kwargs.pop(compat.CACHE)

    monkeypatch.setattr(GenerationMixin, "_prepare_cache_for_generation", renamed)
    return "the preparation adds kv_store"


def ignore_custom_generate(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("hf_paged.hf.prepare.STOCK_GENERATE", lambda *args, custom_generate, **kwargs: None)
    return "doesn't hand the call over"


def other_positions(monkeypatch: pytest.MonkeyPatch) -> str:
    original = GenerationMixin._prepare_position_ids_for_generation

    def shifted(self: Any, *args: Any) -> torch.Tensor:
        return original(self, *args) + 1

    monkeypatch.setattr(GenerationMixin, "_prepare_position_ids_for_generation", shifted)
    return "other positions"


CHANGES = [rename_a_keyword, ignore_custom_generate, other_positions]


@pytest.mark.parametrize("change", CHANGES)
def test_a_preparation_that_is_not_known_is_said_loudly(
    llama: PreTrainedModel, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, whatever the warning filters say: the release, those tested, what failed. Explain says it too."""
    hf_paged.patch(llama)
    why = change(monkeypatch)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("ignore")
        for _ in range(2):
            llama.generate(**BATCH, **KWARGS)
    (line,) = [str(one.message) for one in found if "hf_paged" in str(one.message)]
    assert "\n" not in line
    for part in (why, "NOTHING of generate() runs on the engine", transformers.__version__, *compat.TESTED):
        assert part in line
    explanation = hf_paged.explain(llama)
    assert explanation.path == "stock"
    assert why in str(explanation)
    assert transformers.__version__ in str(explanation)


@pytest.mark.parametrize("given", [{"stop_strings": ["zz"]}, {"num_return_sequences": 2}])
def test_what_the_models_own_config_asks_for_is_no_sign_of_another_release(
    llama: PreTrainedModel, given: dict[str, Any]
) -> None:
    """Stock raises for a plain call too."""
    for name, value in given.items():
        setattr(llama.generation_config, name, value)
    hf_paged.patch(llama)
    state = torch.get_rng_state()
    explanation = hf_paged.explain(llama)
    assert torch.equal(torch.get_rng_state(), state)
    assert "NOTHING" not in str(explanation)
    assert "Transformers itself raises for a plain call" in str(explanation)
    llama.generation_config.num_return_sequences = None
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        llama.generate(**BATCH, **KWARGS, num_beams=2, tokenizer=tiny.tokenizer())
    said = [str(one.message) for one in found if "hf_paged" in str(one.message)]
    assert len(said) == 1
    assert "beam search" in said[0]


@pytest.mark.parametrize("mode", ["silent", "error"])
def test_it_is_said_whatever_on_unsupported_is(
    llama: PreTrainedModel, mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf_paged.patch(llama, on_unsupported=mode)
    why = rename_a_keyword(monkeypatch)
    with caught() as warned:
        try:
            llama.generate(**BATCH, **KWARGS)
        except hf_paged.UnsupportedCallError as error:
            warned_or_raised = [str(error)]
        else:
            warned_or_raised = warned
    (line,) = warned_or_raised or warned
    assert why in line


def test_the_first_call_need_not_be_a_plain_one(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_paged.patch(llama)
    llama.generate(**BATCH, **KWARGS)
    hf_paged.unpatch(llama)
    hf_paged.patch(llama)
    rename_a_keyword(monkeypatch)
    with caught() as warned:
        llama.generate(**BATCH, max_new_tokens=3, do_sample=True, temperature=0.7)
    assert len(warned) == 1
    assert "NOTHING" in warned[0]


def test_a_private_method_that_is_gone_is_a_reason_for_stock(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llama.generate(**BATCH, **KWARGS)
    hf_paged.patch(llama)
    monkeypatch.setattr(compat, "runs_in_step_with_other_processes", lambda *args: args[0].a_method_that_is_gone())
    with caught() as warned:
        same_tensor(llama.generate(**BATCH, **KWARGS), expected)
    assert "a_method_that_is_gone" in warned[0]


def test_check_fails_where_nothing_is_carried(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    zoo.build("llama").save_pretrained(tmp_path)
    assert cli.main(["check", str(tmp_path), "--device", "cpu"]) == 0
    rename_a_keyword(monkeypatch)
    assert cli.main(["check", str(tmp_path), "--device", "cpu"]) == 1
    assert "kv_store" in capsys.readouterr().out


def test_explain_tells_what_a_plain_call_does(llama: PreTrainedModel) -> None:
    """Not only what the model is: its own generation config may ask for beams."""
    llama.generation_config = GenerationConfig(num_beams=3, eos_token_id=2, pad_token_id=0)
    explanation = hf_paged.explain(llama)
    assert (explanation.path, explanation.reason) == ("stock", "beam search is not carried on the engine yet")
    assert "hf_paged.LLM" in str(explanation)
    assert explanation.backend == "sdpa"


def test_a_release_newer_than_tested_is_said_once(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "release", lambda: "5.99.1.dev0")
    monkeypatch.setattr(seam, "_said", set())
    with caught() as warned:
        hf_paged.patch(llama)
        hf_paged.explain(llama)
        hf_paged.patch(zoo.build("gpt2"))
    assert len(warned) == 1
    assert "5.99.1.dev0 is newer than the newest tested release" in warned[0]


@pytest.mark.parametrize(("version", "newer"), [("5.24.0", False), ("5.24.1", True), ("5.23.9", False), ("6.0", True)])
def test_releases_are_compared_by_their_numbers(version: str, newer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "release", lambda: version)
    assert compat.is_newer_than_tested() is newer


def test_the_pinned_release_is_the_newest_tested() -> None:
    from test_packaging import ROOT  # the root of the checkout

    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert f"transformers=={compat.TESTED[-1]}" in pins
    assert f'"transformers>={compat.TESTED[0].removesuffix(".0")}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", compat.CACHE_ARGUMENTS)
def test_a_cache_of_the_callers_own_is_never_ignored(llama: PreTrainedModel, name: str) -> None:
    """Under its new name and its old ones: stock fills it, or refuses the name."""
    cache = DynamicCache(config=llama.config)

    def call() -> torch.Tensor:
        return llama.generate(BATCH["input_ids"][:1], **KWARGS, **{name: cache})

    hf_paged.patch(llama)
    with caught() as warned:
        try:
            call()
        except ValueError:
            assert name not in ("past_key_values", compat.CACHE)
        else:
            assert cache.get_seq_length() == 13
    assert len(warned) == 1
    assert f"a cache of the caller's own ({name})" in warned[0]


def test_no_deprecated_name_is_used(llama: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    """The whole of a call with its results looked at: Transformers has nothing to say about names of ours."""
    logger = transformers.logging.get_logger("transformers")
    transformers.logging.set_verbosity_warning()
    logger.propagate = True
    try:
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            hf_paged.patch(llama, on_unsupported="error")
            hf_paged.explain(llama)
            result = llama.generate(**BATCH, **KWARGS, return_dict_in_generate=True, output_scores=True)
            assert compat.cache_of(result).get_seq_length() == 13
    finally:
        transformers.logging.set_verbosity_error()
        logger.propagate = False
    assert not [record.getMessage() for record in caplog.records if "deprecated" in record.getMessage()]
