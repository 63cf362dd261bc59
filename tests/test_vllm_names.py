"""vLLM's names around LLM: its options, its calls' arguments, and what lm-eval's vLLM backend reads."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoTokenizer, PreTrainedModel
from vllm_defaults import DEFAULTS

import hf_paged
import zoo
from hf_paged import LLM, ConfigError, PagedConfig, SamplingParams, vllm_names

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return zoo.build("llama")


# ------------------------------------------------------------------------------------------------------------- options


def test_every_option_of_vllm_is_taken_at_its_default(model: PreTrainedModel) -> None:
    with LLM(model, tokenizer=tiny.tokenizer()) as plain:
        expected = plain.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        config = plain._patched.config
    with LLM(model, tokenizer=tiny.tokenizer(), **DEFAULTS) as llm:
        assert llm._patched.config == config
        assert llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected


def test_an_option_alone_is_taken_at_its_default() -> None:
    """One that only passes because of another would show here."""
    own = set(LLM.__init__.__kwdefaults__)
    for name, value in DEFAULTS.items():
        if name not in own:
            assert PagedConfig.of(None, vllm_names.paged_options({name: value})) == PagedConfig(), name


def test_every_option_of_vllm_is_known() -> None:
    own = {*LLM.__init__.__kwdefaults__, *PagedConfig.__dataclass_fields__, *vllm_names._RENAMED}
    assert set(DEFAULTS) - own - set(vllm_names.OPTIONS) == set()
    assert not own & set(vllm_names.OPTIONS)


@pytest.mark.parametrize(
    "options",
    [
        {"swap_space": 8},
        {"disable_log_stats": True},
        {"enforce_eager": True},
        {"enforce_eager": None},
        {"distributed_executor_backend": "uni"},
        {"tokenizer_mode": "hf"},
        {"load_format": "safetensors"},
        {"runner": "generate"},
        {"task": "generate"},
        {"model_impl": "transformers"},
        {"enable_chunked_prefill": True},
        {"max_lora_rank": 64},
        {"enable_lora": None},
        {"limit_mm_per_prompt": {"image": 0}},
        {"hf_overrides": {}},
        {"compilation_config": None},
        {"served_model_name": "mine"},
        {"seed": None},
        {"max_model_len": -1},
        {"preemption_mode": "recompute"},
        {"num_scheduler_steps": 1},
        {"device": "auto"},
        {"max_seq_len_to_capture": 8192},
    ],
)
def test_values_that_mean_what_happens_anyway_are_taken(model: PreTrainedModel, options: dict[str, Any]) -> None:
    with LLM(model, skip_tokenizer_init=True, **options) as llm:
        assert llm.generate([[5, 6, 7]], GREEDY, use_tqdm=False)[0].finished


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ({"enable_lora": True}, "PEFT"),
        ({"quantization": "fp8"}, "quantised"),
        ({"quantization": "awq"}, "quantised"),
        ({"kv_cache_dtype": "fp8"}, "quantised"),
        ({"tokenizer_mode": "slow"}, "Transformers"),
        ({"tokenizer_mode": "mistral"}, "Transformers"),
        ({"load_format": "gguf"}, "Transformers"),
        ({"download_dir": "somewhere"}, "Transformers"),
        ({"hf_overrides": {"num_hidden_layers": 1}}, "Transformers"),
        ({"runner": "pooling"}, "Transformers"),
        ({"task": "embed"}, "Transformers"),
        ({"pipeline_parallel_size": 2}, "one device"),
        ({"data_parallel_size": 4}, "one device"),
        ({"distributed_executor_backend": "ray"}, "one device"),
        ({"cpu_offload_gb": 4}, "one device"),
        ({"enable_expert_parallel": True}, "one device"),
        ({"speculative_config": {"method": "ngram"}}, "SamplingParams"),
        ({"logits_processors": ["x"]}, "plugin"),
        ({"generation_config": "vllm"}, "SamplingParams"),
        ({"max_logprobs": 100}, "SamplingParams"),
        ({"logprobs_mode": "processed_logits"}, "SamplingParams"),
        ({"enable_prompt_embeds": True}, "text"),
        ({"mm_processor_kwargs": {"a": 1}}, "text"),
        ({"compilation_config": 3}, "PagedConfig"),
        ({"enable_chunked_prefill": False}, "PagedConfig"),
        ({"enable_sleep_mode": True}, "PagedConfig"),
        ({"tensor_parallel_size": 2}, "only 1"),
    ],
)
def test_other_values_are_refused_with_option_value_and_why(
    model: PreTrainedModel, option: dict[str, Any], why: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(model, skip_tokenizer_init=True, **option)
    ((name, value),) = option.items()
    assert f"{name}={value!r}" in str(caught.value)
    assert why in str(caught.value)


@pytest.mark.parametrize("value", [np.array([1, 2]), torch.tensor([1, 2])])
def test_an_array_is_a_value_like_others(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"hf_overrides=(array|tensor)\(\[1, 2\]\) is not supported"):
        vllm_names.paged_options({"hf_overrides": value})


def test_an_option_that_nobody_knows_is_refused(model: PreTrainedModel) -> None:
    for value in (None, False, 1):
        with pytest.raises(ConfigError, match="unknown option 'quantisation'"):
            LLM(model, skip_tokenizer_init=True, quantisation=value)


def test_options_of_other_names_are_translated(model: PreTrainedModel) -> None:
    options = {"kv_cache_memory_bytes": 2**24, "scheduling_policy": "priority", "max_num_seqs": 8, "block_size": None}
    with LLM(model, skip_tokenizer_init=True, **options) as llm:
        config = llm._patched.config
        assert (config.kv_memory, config.scheduler) == (2**24, "priority")
        assert (config.max_num_seqs, config.block_size) == (8, 16)
    with LLM(model, skip_tokenizer_init=True, config=PagedConfig(max_num_seqs=8), max_num_seqs=None) as llm:
        assert llm._patched.config.max_num_seqs == 8  # None: not given
    with LLM(model, skip_tokenizer_init=True, num_gpu_blocks_override=20) as llm:
        assert llm._patched.config.num_blocks == 20
    with pytest.raises(ConfigError, match="num_gpu_blocks_override=20 and num_blocks=30 say the same; give one"):
        LLM(model, skip_tokenizer_init=True, num_gpu_blocks_override=20, num_blocks=30)


def test_options_of_loading(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    for dtype, expected in (("float", torch.float32), ("half", torch.float16), ("bfloat16", torch.bfloat16)):
        with LLM(str(tmp_path), dtype=dtype, revision="main", tokenizer_revision="main") as llm:
            config = llm.llm_engine.model_config
            assert (config.dtype, config.model, config.tokenizer) == (expected, str(tmp_path), str(tmp_path))
            assert (config.revision, config.tokenizer_revision, config.quantization) == ("main", "main", None)


def test_arguments_of_calls(model: PreTrainedModel) -> None:
    with LLM(model, tokenizer=tiny.tokenizer()) as llm:
        nothing = {"lora_request": None, "tokenization_kwargs": None, "mm_processor_kwargs": None, "use_tqdm": False}
        assert llm.generate([[5, 6]], GREEDY, **nothing)[0].finished
        message = [{"role": "user", "content": "x"}]
        assert llm.chat(message, GREEDY, chat_template_content_format="auto", **nothing)[0].finished
        for call, prompts in ((llm.generate, ["x"]), (llm.chat, message)):
            with pytest.raises(ConfigError, match=r"lora_request='adapter' is not supported: .*PEFT"):
                call(prompts, GREEDY, lora_request="adapter")
            with pytest.raises(ConfigError, match=r"tokenization_kwargs=.* is not supported"):
                call(prompts, GREEDY, tokenization_kwargs={"truncation": True})
        with pytest.raises(ConfigError, match="one of auto, string, openai, got 'parts'"):
            llm.chat(message, GREEDY, chat_template_content_format="parts")


def test_llm_engine_tells_of_the_model(model: PreTrainedModel) -> None:
    with LLM(model, tokenizer=tiny.tokenizer(), seed=7) as llm:
        config = llm.llm_engine.model_config
        assert (config.max_model_len, config.seed, config.get_vocab_size()) == (512, 7, 256)
        assert config.hf_config is model.config
        assert "hidden_size" not in repr(config)
    for options, most in (({"max_model_len": 40}, 40), ({"num_blocks": 9, "block_size": 4}, 36)):
        with LLM(model, skip_tokenizer_init=True, **options) as llm:
            most_fits = [5] * (most - 1)
            assert llm.llm_engine.model_config.max_model_len == most
            one = SamplingParams(temperature=0, max_tokens=1)
            assert llm.generate([most_fits], one, use_tqdm=False)[0].finished
            with pytest.raises(hf_paged.InvalidRequestError):
                llm.generate([[*most_fits, 5]], one, use_tqdm=False)


# ------------------------------------------------------------------------------------------------------------- lm-eval


def _get_tokenizer(name: str, tokenizer_mode: str, **options: Any) -> Any:
    return AutoTokenizer.from_pretrained(name, **options)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module `vllm` whose names point at hf_paged, as a program imports them."""
    names = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams, "TokensPrompt": dict},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": None},
        "vllm.renderers": {},
        "vllm.renderers.hf": {"resolve_chat_template": lambda tokenizer, chat_template, tools, model_config: None},
        "vllm.tokenizers": {"get_tokenizer": _get_tokenizer},
    }
    for name, attributes in names.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    return sys.modules["vllm"]


def test_lm_evals_vllm_backend_finds_all_that_it_calls(vllm: Any, model: PreTrainedModel, tmp_path: Path) -> None:
    """The calls of lm_eval 0.4.13's lm_eval/models/vllm_causallms.py, in its order, with its arguments."""
    from vllm.lora.request import LoRARequest  # noqa: F401
    from vllm.renderers.hf import resolve_chat_template
    from vllm.tokenizers import get_tokenizer

    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    llm = vllm.LLM(
        model=str(tmp_path),
        revision=None,
        dtype="auto",
        tokenizer=None,
        tokenizer_mode="auto",
        tokenizer_revision=None,
        trust_remote_code=False,
        tensor_parallel_size=1,
        max_model_len=None,
        max_num_seqs=None,
        quantization=None,
        seed=1234,
        enable_lora=False,
        max_lora_rank=16,
        gpu_memory_utilization=0.8,
        enforce_eager=True,
    )
    tokenizer = get_tokenizer(str(tmp_path), tokenizer_mode="auto", trust_remote_code=False, revision=None)
    resolve_chat_template(tokenizer=tokenizer, chat_template=None, tools=None, model_config=llm.llm_engine.model_config)
    most = llm.llm_engine.model_config.max_model_len - 1
    _check_loglikelihoods(vllm, llm, model, tokenizer, most)
    _check_generations(vllm, llm, model, tokenizer)
    llm.close()


def _check_loglikelihoods(vllm: Any, llm: LLM, model: PreTrainedModel, tokenizer: Any, most: int) -> None:
    ids = tokenizer("the quick brown fox jumps", return_attention_mask=False).input_ids
    inputs = [ids, ids[:5], [*ids, *[7] * most][:most]]
    params = vllm.SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False)
    outputs = llm.generate(
        [vllm.TokensPrompt(prompt_token_ids=one) for one in inputs],
        sampling_params=[params] * len(inputs),
        use_tqdm=True,
        lora_request=None,
    )
    for tokens, output in zip(inputs, outputs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        assert output.prompt_logprobs[0] is None
        for at, token in enumerate(tokens[1:], 1):
            found = {i: getattr(entry, "logprob", entry) for i, entry in output.prompt_logprobs[at].items()}
            assert found[token] == pytest.approx(float(logits[at - 1, token]), abs=1e-4)
            assert max(found, key=found.get) == int(logits[at - 1].argmax())


def _check_generations(vllm: Any, llm: LLM, model: PreTrainedModel, tokenizer: Any) -> None:
    eos = tokenizer.decode(tokenizer.eos_token_id)
    prompts = [tokenizer(text, return_attention_mask=False).input_ids for text in ("hello world", "a", "one two")]
    params = [
        vllm.SamplingParams(
            max_tokens=most,
            stop=["\n\n", eos],
            temperature=0.0,
            skip_special_tokens=False,
            spaces_between_special_tokens=False,
        )
        for most in (12, 3, 12)
    ]
    outputs = llm.generate(
        [vllm.TokensPrompt(prompt_token_ids=one) for one in prompts],
        sampling_params=params,
        use_tqdm=False,
        lora_request=None,
    )
    for prompt, one, output in zip(prompts, params, outputs, strict=True):
        stock = model.generate(torch.tensor([prompt]), max_new_tokens=one.max_tokens, do_sample=False)[0, len(prompt) :]
        assert output.outputs[0].text.split(eos)[0] == tokenizer.decode(stock).split(eos)[0].split("\n\n")[0]
