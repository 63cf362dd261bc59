"""LLM: vLLM's offline names over a live Transformers model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

import hf_paged
import zoo
from hf_paged import LLM, ConfigError, InvalidRequestError, SamplingParams
from hf_paged import llm as llm_module

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()

TEXTS = ["a paged cache", "b", "continuous batching", "Ünïcödé läßt grüßen", "the live model"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """256 tokens: two special ones, then every byte but the last two."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:253]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return zoo.build("llama")


@pytest.fixture(scope="module")
def llm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Any:
    with LLM(model, tokenizer=tokenizer, block_size=4) as made:
        yield made


def greedy(model: PreTrainedModel, ids: list[int], count: int = 8) -> list[int]:
    """Stock's continuation of one prompt, up to its end of sequence."""
    tail = model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)[0, len(ids) :].tolist()
    return tail[: tail.index(zoo.EOS) + 1] if zoo.EOS in tail else tail


def ids_of(outputs: list[hf_paged.RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


def run(llm: LLM, prompts: Any, params: Any = None, **kwargs: Any) -> list[hf_paged.RequestOutput]:
    return llm.generate(prompts, params, use_tqdm=False, **kwargs)


# -------------------------------------------------------------------------------------------------------------- prompts


def test_texts(llm: LLM, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    outputs = run(llm, TEXTS, GREEDY)
    assert [output.prompt for output in outputs] == TEXTS
    for text, output in zip(TEXTS, outputs, strict=True):
        ids = tokenizer.encode(text)
        assert output.prompt_token_ids == ids
        assert output.finished
        (completion,) = output.outputs
        assert completion.token_ids == greedy(model, ids)
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert completion.finish_reason == ("stop" if zoo.EOS in completion.token_ids else "length")
        assert completion.index == 0
        assert output.metrics is not None
        assert output.metrics.first_token_time is not None


def test_forms_of_prompts(llm: LLM, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode(TEXTS[0])
    expected = ids_of(run(llm, [TEXTS[0]], GREEDY))
    for prompts in (
        TEXTS[0],
        ids,
        [ids],
        (TEXTS[0],),
        {"prompt": TEXTS[0]},
        {"prompt_token_ids": ids},
        [{"prompt": TEXTS[0]}],
        [{"prompt_token_ids": ids}],
    ):
        assert ids_of(run(llm, prompts, GREEDY)) == expected
    for prompts in (
        np.array(ids),
        torch.tensor(ids),
        [np.int64(i) for i in ids],
        list(torch.tensor(ids)),
        [np.array(ids)],
        np.array([ids]),
        torch.tensor([ids]),
        np.array([TEXTS[0]]),
        (prompt for prompt in [TEXTS[0]]),
        {"prompt_token_ids": np.array(ids)},
        {"prompt": TEXTS[0], "prompt_token_ids": None, "multi_modal_data": None},
        {"prompt": None, "prompt_token_ids": ids},
        {"prompt": ids, "cache_salt": None},
    ):
        assert ids_of(run(llm, prompts, GREEDY)) == expected
    (both,) = run(llm, {"prompt": "another", "prompt_token_ids": ids}, GREEDY)
    assert (both.prompt, both.prompt_token_ids) == ("another", ids)  # as in vLLM
    assert ids_of(run(llm, np.array([ids, ids]), GREEDY)) == expected * 2
    assert run(llm, np.array([], int), GREEDY) == []
    mixed = run(llm, [TEXTS[0], tokenizer.encode(TEXTS[1]), {"prompt": TEXTS[2]}], GREEDY)
    assert ids_of(mixed) == ids_of(run(llm, TEXTS[:3], GREEDY))
    assert [output.prompt for output in mixed] == [TEXTS[0], None, TEXTS[2]]
    assert run(llm, [], GREEDY) == []


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"prompt": "ab", "multi_modal_data": {"image": 1}}, "the key 'multi_modal_data' of a prompt dict"),
        ({"prompt_embeds": torch.zeros(2, 64)}, "the key 'prompt_embeds' of a prompt dict"),
        ({"prompt": "ab", "cache_salt": ""}, "cache_salt must be a text that isn't empty, or None, got ''"),
        ({"prompt": "ab", "cache_salt": 5}, "cache_salt must be .*, got 5"),
        ({"prompt": None}, r"needs 'prompt' or 'prompt_token_ids'; it has \['prompt'\]"),
        ({"prompt": [5], "prompt_token_ids": [5]}, r"prompt must be a text beside prompt_token_ids, got \[5\]"),
        ({"prompt_token_ids": "ab"}, "a text or a list of token ids, got 'ab'"),
        ("a\ud800b", r"the text has half of a surrogate pair, '\\ud800', at character 1"),
        ({"prompt": "\udfff"}, "half of a surrogate pair"),
        (np.array([1.5]), "a text or a list of token ids, got array"),
        (np.zeros((1, 1), int), "a text or a list of token ids, got array"),
        ({5, 6}, "a text or a list of token ids"),
        (b"ab", "a text or a list of token ids, got b'ab'"),
        (None, "a text or a list of token ids, got None"),
    ],
)
def test_prompts_that_are_none(llm: LLM, wrong: Any, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"prompt 1: .*{why}"):
        run(llm, [[5, 6], wrong], GREEDY)


@pytest.mark.parametrize("wrong", [5, None, np.array(5), {5, 6}])
def test_one_prompt_that_is_none(llm: LLM, wrong: Any) -> None:
    with pytest.raises(InvalidRequestError, match="prompts are texts, lists of token ids or dicts, one or many, got "):
        run(llm, wrong, GREEDY)


def test_a_cache_salt_keeps_blocks_apart(model: PreTrainedModel) -> None:
    (ids,) = zoo.prompts(3, (40,))
    with LLM(model, skip_tokenizer_init=True, block_size=4, num_blocks=100) as llm:
        found = []
        for salt in (None, "a", "b", "a", None):
            (output,) = run(llm, {"prompt_token_ids": ids, "cache_salt": salt}, GREEDY)
            found.append((output.num_cached_tokens > 0, output.outputs[0].token_ids))
    assert [cached for cached, _ in found] == [False, False, False, True, True]
    assert all(tokens == found[0][1] for _, tokens in found)


def test_sampling_params_that_are_none(llm: LLM) -> None:
    default = llm.get_default_sampling_params()
    assert ids_of(run(llm, [[5, 6], [5, 6]], [GREEDY, None])) == ids_of(run(llm, [[5, 6], [5, 6]], [GREEDY, default]))
    llm.model.generation_config.temperature, before = 5.0, llm.model.generation_config.temperature
    assert run(llm, [5, 6], GREEDY)  # defaults that are wrong don't matter where params are given
    llm.model.generation_config.temperature = before
    for wrong in ({"temperature": 0}, "x", 5):
        with pytest.raises(
            ConfigError, match="sampling_params must be a SamplingParams, a list of them, or None, got "
        ):
            run(llm, [5, 6], wrong)
    with pytest.raises(ConfigError, match=r"sampling_params\[1\] must be a SamplingParams or None, got \{'n': 1\}"):
        run(llm, [[5], [6]], [GREEDY, {"n": 1}])


def test_bad_words_are_tokenised_once_a_call(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, encoded = llm.tokenizer.encode, []
    monkeypatch.setattr(llm.tokenizer, "encode", lambda text, **k: encoded.append(text) or encode(text, **k))
    params = [GREEDY.replace(bad_words=[word]) for word in ("x", "y", "x")]
    outputs = run(llm, [[5, 6]] * 3, params)
    assert sorted(encoded) == [" x", " y", "x", "y"]
    assert len(outputs) == 3


def test_an_engine_that_another_call_closed_meanwhile(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model changes while prompts are tokenised, or just before they are carried: the next engine carries them."""
    model, carry, closed = zoo.build("llama"), llm_module.carry, []
    with LLM(model, tokenizer=tokenizer) as llm:
        expected = ids_of(run(llm, TEXTS, GREEDY))

        def change() -> None:
            _, thread = llm.engine()
            closed.append(thread.engine)
            model.register_forward_hook(lambda *_: None)
            llm.engine()

        def encode(text: str, **options: Any) -> list[int]:
            if not closed:
                change()
            return original(text, **options)

        original = tokenizer.encode
        monkeypatch.setattr(tokenizer, "encode", encode)
        assert ids_of(run(llm, TEXTS, GREEDY)) == expected
        monkeypatch.setattr(llm_module, "carry", lambda *a, **k: (len(closed) < 2 and change(), carry(*a, **k)))
        assert ids_of(run(llm, TEXTS, GREEDY)) == expected
        assert [engine.closed for engine in closed] == [True, True]
        monkeypatch.setattr(llm_module, "carry", lambda *a, **k: (change(), carry(*a, **k)))
        with pytest.raises(hf_paged.EngineClosedError):  # once more, and no more
            run(llm, TEXTS, GREEDY)
        assert len(closed) == 4


def test_order_of_outputs(llm: LLM) -> None:
    """Prompts end at different times, in few rows at once; outputs come in the order of the prompts."""
    prompts = zoo.prompts(5, [3 + i * 11 % 17 for i in range(24)])
    params = [SamplingParams(temperature=0.0, max_tokens=1 + i * 7 % 13, ignore_eos=True) for i in range(24)]
    outputs = run(llm, prompts, params)
    assert [output.prompt_token_ids for output in outputs] == prompts
    assert [len(ids) for ids in ids_of(outputs)] == [p.max_tokens for p in params]
    assert len({output.request_id for output in outputs}) == 24


def test_the_longest_outputs_are_begun_first(model: PreTrainedModel) -> None:
    prompts = zoo.prompts(3, (5, 6, 7, 8))
    params = [GREEDY.replace(max_tokens=n) for n in (3, 9, 3, 20)]
    with LLM(model, skip_tokenizer_init=True, max_num_seqs=1, block_size=4) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    begun = sorted(range(4), key=lambda i: outputs[i].metrics.first_scheduled_time)
    assert begun == [3, 1, 0, 2]
    assert [len(output.outputs[0].token_ids) for output in outputs] == [3, 9, 3, 20]


def test_priority(model: PreTrainedModel) -> None:
    finished: list[int] = []

    class Watch:
        @hf_paged.hookimpl
        def request_finished(self, request: Any, output: Any) -> None:
            finished.append(request.prompt_token_ids[0])

    with LLM(model, skip_tokenizer_init=True, scheduler="priority", max_num_seqs=1, plugins=(Watch(),)) as llm:
        run(llm, [[10, 3], [11, 3], [12, 3]], GREEDY, priority=[5, 0, 2])
        assert finished == [11, 12, 10]
        finished.clear()
        run(llm, [[10, 3], [11, 3], [12, 3]], GREEDY, priority=np.array([5, 2, -1]))
        outputs = run(llm, [[13, 3], [14, 3]], GREEDY, priority=[None, -1])
        assert finished == [12, 11, 10, 14, 13]
        assert len({output.metrics.arrival_time for output in outputs}) == 1  # one call is one moment
        with pytest.raises(ConfigError, match="priority has 2 entries for 3 prompts"):
            run(llm, [[10], [11], [12]], GREEDY, priority=[1, 2])
        with pytest.raises(ConfigError, match=r"priority\[1\] must be an integer or None, got 'high'"):
            run(llm, [[10], [11]], GREEDY, priority=[1, "high"])
        with pytest.raises(ConfigError, match="priority must be a list of integers, or None, got 1"):
            run(llm, [[10]], GREEDY, priority=1)


def test_a_priority_without_effect_is_refused(llm: LLM) -> None:
    assert len(run(llm, [[5], [6]], GREEDY, priority=[0, None])) == 2
    with pytest.raises(ConfigError, match=r"priority\[1\]=3 has no effect under scheduler='fcfs'"):
        run(llm, [[5], [6]], GREEDY, priority=[0, 3])


def test_one_wrong_prompt_among_many(llm: LLM) -> None:
    forwards: list[int] = []
    hook = llm.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    run(llm, [5, 6], GREEDY)  # the model is looked at anew, with its hook
    forwards.clear()
    for wrong in ([5, 999], [], [5] * 600, {"text": "x"}):
        with pytest.raises(InvalidRequestError, match="prompt 2"):
            run(llm, [[5, 6], [7], wrong, [8]], GREEDY)
    with pytest.raises(ConfigError, match="sampling_params has 2 entries for 3 prompts"):
        run(llm, [[5], [6], [7]], [GREEDY, GREEDY])
    hook.remove()
    assert not forwards
    assert llm.stats.num_free == llm.stats.num_blocks


# ----------------------------------------------------------------------------------------------------------------- chat


def test_chat(llm: LLM, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    one = [{"role": "user", "content": "hello"}]
    two = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    ids = tokenizer.encode("[user]hello[assistant]")
    (output,) = llm.chat(one, GREEDY, use_tqdm=False)
    assert output.prompt == "[user]hello[assistant]"
    assert output.prompt_token_ids == ids
    assert output.outputs[0].token_ids == greedy(model, ids)
    both = llm.chat([one, two], GREEDY, use_tqdm=False)
    assert [one.prompt for one in both] == ["[user]hello[assistant]", "[user]a[assistant]b[user]c[assistant]"]
    assert both[0].outputs[0].token_ids == output.outputs[0].token_ids
    (output,) = llm.chat(one, GREEDY, use_tqdm=False, add_generation_prompt=False)
    assert output.prompt == "[user]hello"
    (output,) = llm.chat(two[:2], GREEDY, use_tqdm=False, add_generation_prompt=False, continue_final_message=True)
    assert output.prompt == "[user]a[assistant]b"
    (output,) = llm.chat(
        one,
        GREEDY,
        use_tqdm=False,
        chat_template="<{{ messages[0].content }}{{ mark }}>",
        chat_template_kwargs={"mark": "!"},
    )
    assert output.prompt == "<hello!>"
    with pytest.raises(ConfigError, match="continue_final_message"):
        llm.chat(one, GREEDY, continue_final_message=True)


def test_chat_needs_a_template(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with LLM(model, skip_tokenizer_init=True) as llm, pytest.raises(ConfigError, match="tokenizer"):
        llm.chat([{"role": "user", "content": "x"}])
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with LLM(model, tokenizer=bare) as llm, pytest.raises(ConfigError, match="chat template"):
        llm.chat([{"role": "user", "content": "x"}])
    with LLM(model, tokenizer=bare, chat_template=TEMPLATE) as llm:
        assert llm.chat([{"role": "user", "content": "x"}], GREEDY, use_tqdm=False)[0].prompt == "[user]x[assistant]"


# ------------------------------------------------------------------------------------------------------------- sampling


def test_n_and_seeds(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=3, max_tokens=10, ignore_eos=True)
    (output,) = run(llm, [TEXTS[0]], params)
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 4
    # Completion i draws with seed + i, whatever batch it lands in.
    singles = [run(llm, TEXTS[:1], params.replace(n=1, seed=3 + i)) for i in range(4)]
    assert ids_of([output]) == [ids_of(single)[0] for single in singles]
    crowd = run(llm, [*TEXTS[1:], TEXTS[0]], [SamplingParams(max_tokens=12), *[GREEDY] * 3, params])
    assert ids_of(crowd[-1:]) == ids_of([output])


def test_without_a_seed_draws_differ_and_llms_repeat(model: PreTrainedModel) -> None:
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    runs = []
    for _ in range(2):
        with LLM(model, skip_tokenizer_init=True, seed=5) as llm:
            runs.append(ids_of(run(llm, [[5, 6, 7]] * 3, params)))
    assert runs[0] == runs[1]
    assert len({tuple(ids) for ids in runs[0]}) == 3


def test_global_random_state_is_left_alone(llm: LLM) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    run(llm, TEXTS, SamplingParams(max_tokens=5, n=2))
    assert torch.equal(torch.get_rng_state(), state)


def test_stop_strings(llm: LLM, tokenizer: PreTrainedTokenizerFast) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    (whole,) = run(llm, TEXTS[0], params)
    text = whole.outputs[0].text
    at = next(i for i in range(4, len(text) - 2) if text[i : i + 2].isascii() and text.find(text[i : i + 2]) == i)
    stop = text[at : at + 2]
    (output,) = run(llm, TEXTS[0], params.replace(stop=["never found", stop]))
    completion = output.outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (text[:at], "stop", stop)
    assert completion.token_ids == whole.outputs[0].token_ids[: len(completion.token_ids)]
    (output,) = run(llm, TEXTS[0], params.replace(stop=stop, include_stop_str_in_output=True))
    assert output.outputs[0].text == text[: at + 2]
    (output,) = run(llm, TEXTS[0], params.replace(stop="never found"))
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == (text, None)


def test_stop_strings_after_min_tokens(llm: LLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """The text is whole, and what was found before counts for nothing."""
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    (whole,) = run(llm, TEXTS[0], params)
    text = whole.outputs[0].text
    (output,) = run(llm, TEXTS[0], params.replace(min_tokens=6, stop="never found"))
    assert output.outputs[0].text == text
    early = tokenizer.decode(whole.outputs[0].token_ids[1:2])
    (output,) = run(llm, TEXTS[0], params.replace(min_tokens=6, stop=early))
    assert len(output.outputs[0].token_ids) >= 6
    assert output.outputs[0].text.startswith(tokenizer.decode(whole.outputs[0].token_ids[:5]))


def test_stop_token_ids(llm: LLM, tokenizer: PreTrainedTokenizerFast) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    (whole,) = run(llm, TEXTS[0], params)
    token = whole.outputs[0].token_ids[6]
    first = whole.outputs[0].token_ids.index(token)
    for stop in (None, "never found"):
        (output,) = run(llm, TEXTS[0], params.replace(stop_token_ids=[token], stop=stop))
        completion = output.outputs[0]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", token)
        assert completion.token_ids == whole.outputs[0].token_ids[: first + 1]
        assert completion.text == tokenizer.decode(completion.token_ids[:-1])
        (output,) = run(
            llm, TEXTS[0], params.replace(stop_token_ids=[token], stop=stop, include_stop_str_in_output=True)
        )
        assert output.outputs[0].text == tokenizer.decode(completion.token_ids)
    (output,) = run(llm, TEXTS[0], params.replace(stop_token_ids=[token], min_tokens=first + 3))
    assert token not in output.outputs[0].token_ids[: first + 2]
    assert len(output.outputs[0].token_ids) >= first + 3


def test_end_of_sequence(llm: LLM) -> None:
    push = {zoo.EOS: 100.0}
    (output,) = run(llm, TEXTS[0], GREEDY.replace(logit_bias=push))
    completion = output.outputs[0]
    assert (completion.token_ids, completion.text, completion.finish_reason) == ([zoo.EOS], "", "stop")
    (output,) = run(llm, TEXTS[0], GREEDY.replace(logit_bias=push, ignore_eos=True))
    assert output.outputs[0].token_ids == [zoo.EOS] * 8
    assert output.outputs[0].finish_reason == "length"
    for keep, text in ((False, ""), (True, "</s>")):
        params = GREEDY.replace(logit_bias=push, skip_special_tokens=False, include_stop_str_in_output=keep)
        assert run(llm, TEXTS[0], params)[0].outputs[0].text == text
    (output,) = run(llm, TEXTS[0], GREEDY.replace(logit_bias=push, min_tokens=4))
    assert output.outputs[0].token_ids.index(zoo.EOS) == 4


def test_text_of_split_characters(llm: LLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Random bytes: half characters, and ones that never become whole."""
    params = SamplingParams(max_tokens=60, ignore_eos=True, temperature=2.0)
    for seed in range(6):
        for stop in (None, "never found"):
            (output,) = run(llm, "é", params.replace(seed=seed, stop=stop))
            whole = tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)
            # A broken byte is decoded alone or with its neighbours; the readable characters are the same.
            assert output.outputs[0].text.replace("�", "") == whole.replace("�", "")


def test_logprobs(llm: LLM, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Of the raw distribution, against a plain forward over prompt and output."""
    params = SamplingParams(
        max_tokens=6, ignore_eos=True, seed=1, temperature=0.5, top_k=40, logprobs=3, prompt_logprobs=2
    )
    (output,) = run(llm, TEXTS[0], params)
    prompt, completion = output.prompt_token_ids, output.outputs[0]
    with torch.no_grad():
        reference = model(torch.tensor([prompt + completion.token_ids])).logits[0].log_softmax(-1)
    assert completion.logprobs is not None
    assert len(completion.logprobs) == 6
    total = 0.0
    for index, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        row = reference[len(prompt) + index - 1]
        assert next(iter(entry)) == token
        assert set(row.topk(3).indices.tolist()) <= set(entry)
        assert 3 <= len(entry) <= 4
        for i, value in entry.items():
            assert value.logprob == pytest.approx(float(row[i]), abs=1e-4)
            assert value.rank == int((row > row[i]).sum()) + 1
            text = tokenizer.decode([i])
            assert value.decoded_token == text or (text == "�" and value.decoded_token.startswith("bytes:"))
        total += entry[token].logprob
    assert completion.cumulative_logprob == pytest.approx(total)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for index in range(1, len(prompt)):
        entry = output.prompt_logprobs[index]
        assert entry is not None
        assert entry[prompt[index]].logprob == pytest.approx(float(reference[index - 1, prompt[index]]), abs=1e-4)
        assert 2 <= len(entry) <= 3
    (every,) = run(llm, TEXTS[0], SamplingParams(max_tokens=1, logprobs=-1))
    assert len(every.outputs[0].logprobs[0]) == zoo.VOCAB
    (own,) = run(llm, TEXTS[0], SamplingParams(max_tokens=2, logprobs=0, ignore_eos=True))
    assert [list(entry) for entry in own.outputs[0].logprobs] == [[token] for token in own.outputs[0].token_ids]


def test_prompt_logprobs_in_chunks_and_after_a_cached_prefix(model: PreTrainedModel) -> None:
    prompt = zoo.prompts(1, (40,))[0]
    with torch.no_grad():
        reference = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    with LLM(model, skip_tokenizer_init=True, block_size=4, max_num_batched_tokens=7) as llm:
        run(llm, prompt, GREEDY)
        (output,) = run(llm, prompt, GREEDY.replace(prompt_logprobs=0))
    assert len(output.prompt_logprobs) == 40
    for index in range(1, 40):
        expected = float(reference[index - 1, prompt[index]])
        assert output.prompt_logprobs[index][prompt[index]].logprob == pytest.approx(expected, abs=1e-4)


def test_bad_words(llm: LLM, tokenizer: PreTrainedTokenizerFast) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    (whole,) = run(llm, TEXTS[0], params)
    ids = whole.outputs[0].token_ids
    at = next(
        i
        for i in range(3, 18)
        if tokenizer.decode(ids[i : i + 2]).isascii()
        and tokenizer.decode(ids[i : i + 2]).strip() == tokenizer.decode(ids[i : i + 2])
    )
    word = tokenizer.decode(ids[at : at + 2])
    (output,) = run(llm, TEXTS[0], params.replace(bad_words=[word]))
    assert output.outputs[0].token_ids[: at + 1] == ids[: at + 1]
    assert word not in output.outputs[0].text
    letter = tokenizer.decode(ids[at : at + 1])
    (output,) = run(llm, TEXTS[0], params.replace(bad_words=[letter]))
    assert ids[at] not in output.outputs[0].token_ids


def test_bias_and_allowed_ids(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=0)
    (output,) = run(llm, TEXTS[0], params.replace(allowed_token_ids=[20, 30, 40]))
    assert set(output.outputs[0].token_ids) <= {20, 30, 40}
    (output,) = run(llm, TEXTS[0], params.replace(logit_bias={77: 100.0}))
    assert set(output.outputs[0].token_ids) == {77}
    (output,) = run(llm, TEXTS[0], params.replace(logit_bias={77: -100.0}))
    assert 77 not in output.outputs[0].token_ids


def test_penalties(llm: LLM, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer.encode(TEXTS[2])
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    (output,) = run(llm, ids, params.replace(repetition_penalty=1.5))
    stock = model.generate(
        torch.tensor([ids]), max_new_tokens=12, min_new_tokens=12, do_sample=False, repetition_penalty=1.5
    )
    if zoo.EOS not in output.outputs[0].token_ids:
        assert output.outputs[0].token_ids == stock[0, len(ids) :].tolist()
    # Greedy by hand, with penalties over the output alone.
    presence, frequency, tokens = 1.5, 0.7, list(ids)
    for _ in range(12):
        with torch.no_grad():
            row = model(torch.tensor([tokens])).logits[0, -1].clone()
        for token in set(tokens[len(ids) :]):
            row[token] -= presence + frequency * tokens[len(ids) :].count(token)
        tokens.append(int(row.argmax()))
    (output,) = run(llm, ids, params.replace(presence_penalty=presence, frequency_penalty=frequency))
    assert output.outputs[0].token_ids == tokens[len(ids) :]


@pytest.mark.parametrize("changes", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.3}])
def test_truncated_sampling_stays_in_its_set(
    llm: LLM, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, changes: Any
) -> None:
    ids = tokenizer.encode(TEXTS[0])
    with torch.no_grad():
        probabilities = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
    ordered = probabilities.sort(descending=True)
    kept = {
        "top_k": ordered.indices[:5],
        "top_p": ordered.indices[ordered.values.cumsum(0) - ordered.values < 0.6],
        "min_p": (probabilities >= 0.3 * probabilities.max()).nonzero().flatten(),
    }[next(iter(changes))]
    outputs = run(llm, [ids] * 200, SamplingParams(max_tokens=1, seed=None, **changes))
    drawn = {tokens[0] for tokens in ids_of(outputs)}
    assert drawn <= set(kept.tolist())
    assert len(drawn) > 1 or len(kept) == 1


def test_max_tokens_none(model: PreTrainedModel) -> None:
    with LLM(model, skip_tokenizer_init=True, max_model_len=40) as llm:
        (output,) = run(llm, [5, 6, 7], SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 37
    assert output.outputs[0].finish_reason == "length"


def test_defaults_come_from_the_generation_config(tokenizer: PreTrainedTokenizerFast) -> None:
    model = zoo.build("llama")
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
        top_k=33,
        repetition_penalty=1.2,
        max_new_tokens=5,
        eos_token_id=[7, 8],
        pad_token_id=0,
    )
    with LLM(model, tokenizer=tokenizer) as llm:
        params = llm.get_default_sampling_params()
        assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.9, 33)
        assert (params.repetition_penalty, params.max_tokens) == (1.2, 5)
        assert len(run(llm, TEXTS[0])[0].outputs[0].token_ids) <= 5
        for end in (7, 8, zoo.EOS):  # the config's, and the tokenizer's
            (output,) = run(llm, TEXTS[0], SamplingParams(logit_bias={end: 100.0}))
            assert output.outputs[0].token_ids == [end]
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    with LLM(model, tokenizer=tokenizer) as llm:
        assert llm.get_default_sampling_params().greedy


# ----------------------------------------------------------------------------------------------------------- the engine


def test_prefix_cache(llm: LLM, model: PreTrainedModel) -> None:
    prompt = zoo.prompts(9, (41,))[0]
    expected = greedy(model, prompt)
    (first,) = run(llm, prompt, GREEDY)
    (second,) = run(llm, prompt, GREEDY)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 40)
    llm.reset_prefix_cache()
    (third,) = run(llm, prompt, GREEDY)
    assert third.num_cached_tokens == 0
    assert ids_of([first, second, third]) == [expected] * 3
    with LLM(model, skip_tokenizer_init=True, enable_prefix_caching=False) as other:
        run(other, prompt, GREEDY)
        assert run(other, prompt, GREEDY)[0].num_cached_tokens == 0


def test_weights_are_live() -> None:
    model, prompt = zoo.build("llama"), zoo.prompts(9, (21,))[0]
    with LLM(model, skip_tokenizer_init=True, block_size=4) as llm:
        assert ids_of(run(llm, prompt, GREEDY)) == [greedy(model, prompt)]
        model.load_state_dict(zoo.build("llama", seed=4).state_dict())
        assert ids_of(run(llm, prompt, GREEDY)) == [greedy(model, prompt)]


def test_beside_a_patch() -> None:
    model, prompt = zoo.build("llama"), zoo.prompts(9, (21,))[0]
    expected = greedy(model, prompt)
    with hf_paged.paged(model), LLM(model, skip_tokenizer_init=True) as llm:
        assert ids_of(run(llm, prompt, GREEDY)) == [expected]
        assert greedy(model, prompt) == expected
    assert greedy(model, prompt) == expected


def test_without_a_tokenizer(model: PreTrainedModel) -> None:
    with LLM(model, skip_tokenizer_init=True) as llm:
        assert llm.get_tokenizer() is None
        (output,) = run(llm, [5, 6, 7], GREEDY)
        assert output.outputs[0].text == ""
        assert output.prompt is None
        with pytest.raises(ConfigError, match="tokenizer"):
            run(llm, "text", GREEDY)
        with pytest.raises(ConfigError, match="tokenizer"):
            run(llm, [5], SamplingParams(stop="x"))


def test_progress_bar(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(TEXTS, GREEDY)
    bar = capsys.readouterr().err
    assert "Processed prompts" in bar
    assert "5/5" in bar
    assert "est. speed input" in bar
    run(llm, TEXTS, GREEDY)
    assert not capsys.readouterr().err


def test_a_progress_bar_of_the_callers(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    class Bar:
        def __init__(self, **options: Any) -> None:
            seen.append(options["total"])

        def update(self, n: int) -> None:
            seen.append(n)

        def set_postfix_str(self, text: str) -> None:
            pass

        def close(self) -> None:
            seen.append("closed")

    seen: list[Any] = []
    llm.generate(TEXTS[:2], GREEDY, use_tqdm=Bar)
    assert seen == [2, 1, 1, "closed"]
    assert not capsys.readouterr().err


def test_an_interrupt_leaves_an_llm_that_works(model: PreTrainedModel) -> None:
    prompts = zoo.prompts(1, (9, 5, 7))
    forwards, armed = [0], False

    def interrupt(*_: Any) -> None:
        forwards[0] += armed
        if forwards[0] == 5:
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(interrupt)
    with LLM(model, skip_tokenizer_init=True) as llm:
        armed = True
        with pytest.raises(KeyboardInterrupt):
            run(llm, prompts, GREEDY)
        assert llm.stats.num_free == llm.stats.num_blocks
        assert ids_of(run(llm, prompts, GREEDY)) == [greedy(model, prompt) for prompt in prompts]
    hook.remove()


def test_each_call_looks_at_the_model() -> None:
    model, prompt = zoo.build("llama"), zoo.prompts(9, (21,))[0]
    with LLM(model, skip_tokenizer_init=True) as llm:
        model.config.attention_dropout = 0.5
        model.train()
        with pytest.raises(hf_paged.UnsupportedModelError, match="training mode"):
            run(llm, prompt, GREEDY)
        model.eval()
        model.double()
        assert ids_of(run(llm, prompt, GREEDY)) == [greedy(model, prompt)]
        llm.reset_prefix_cache()


def test_the_pool_is_given_back_where_asked(model: PreTrainedModel) -> None:
    config = hf_paged.PagedConfig(keep_pool=False)
    for options in ({"keep_pool": False}, {"config": config}, {"config": config, "keep_pool": True}, {}):
        with LLM(model, skip_tokenizer_init=True, **options) as llm:
            run(llm, [5, 6, 7], GREEDY)
            assert (llm.stats.pool_bytes > 0) == options.get("keep_pool", not options)


@pytest.mark.parametrize("option", [{"dtype": "float16"}, {"revision": "main"}, {"trust_remote_code": True}])
def test_options_for_loading_beside_a_model(model: PreTrainedModel, option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        LLM(model, skip_tokenizer_init=True, **option)


def test_options_that_nothing_uses(tmp_path: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(tmp_path)
    for option in ({"trust_remote_code": True}, {"revision": "main"}, {"tokenizer_revision": "main"}):
        with LLM(model, tokenizer=str(tmp_path), **option) as llm:
            assert run(llm, "a", GREEDY)[0].prompt_token_ids == tokenizer.encode("a")
        with pytest.raises(ConfigError, match=f"{next(iter(option))}='?(main|True)'? would have no effect"):
            LLM(model, tokenizer=tokenizer, **option)
    model.save_pretrained(tmp_path)
    for given in ({"tokenizer": tokenizer}, {"skip_tokenizer_init": True}):
        with pytest.raises(ConfigError, match="tokenizer_revision='nope' would have no effect: no tokenizer is loaded"):
            LLM(str(tmp_path), tokenizer_revision="nope", **given)
    with pytest.raises(ConfigError, match="revision='a' would have no effect: tokenizer_revision goes before it"):
        LLM(model, tokenizer=str(tmp_path), revision="a", tokenizer_revision="b")


@pytest.mark.parametrize("seed", ["x", 1.5, True, [1]])
def test_a_seed_that_is_no_integer(model: PreTrainedModel, seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed must be an integer or None, got "):
        LLM(model, skip_tokenizer_init=True, seed=seed)


@pytest.mark.parametrize("seed", [None, -1, 2**70, np.int64(7)])
def test_any_integer_is_a_seed(model: PreTrainedModel, seed: Any) -> None:
    with LLM(model, skip_tokenizer_init=True, seed=seed) as llm:
        (output,) = run(llm, [5, 6], SamplingParams(max_tokens=2, ignore_eos=True))
        assert output.outputs[0].finish_reason == "length"
        assert llm.llm_engine.model_config.seed == (seed or 0)


def test_by_name(tmp_path: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with LLM(str(tmp_path)) as llm:
        (output,) = run(llm, TEXTS[0], GREEDY)
        assert output.outputs[0].token_ids == greedy(model, tokenizer.encode(TEXTS[0]))
        assert output.outputs[0].text
    with pytest.raises(ConfigError, match="tensor_parallel_size=2"):
        LLM(str(tmp_path), tensor_parallel_size=2)


NO_IDS = [[2**70], [-1], [2**63], [256], [1, -(2**40)], [1.5], [None], [[1]], torch.tensor([0.5])]


def test_prompts_of_ids_that_are_none(tokenizer: PreTrainedTokenizerFast) -> None:
    with LLM(zoo.build("llama"), tokenizer=tokenizer, block_size=4) as llm:
        for ids in NO_IDS:
            message = "prompt 0: (token id|a prompt is a text or a list of token ids)"
            with pytest.raises(InvalidRequestError, match=message):
                llm.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=2), use_tqdm=False)
        (output,) = llm.generate({"prompt_token_ids": torch.tensor([5, 6])}, GREEDY, use_tqdm=False)
    assert output.prompt_token_ids == [5, 6]


ANY_NUMBER: list[dict[str, Any]] = [
    *({"seed": seed} for seed in (2**63, 2**70, -5, -(2**80))),
    *({"top_k": top_k} for top_k in (2**31, 2**63, 2**70)),
    *({"stop_token_ids": [token]} for token in (-1, 2**31, 2**70)),
    {"min_tokens": 2**70, "max_tokens": None},
    {"top_p": 1e-300},
    {"temperature": 1.1e-5, "logit_bias": {5: 1e30}, "repetition_penalty": 1e-3},
    {"n": 3, "seed": 2**63 - 1},
]


def test_numbers_of_any_size(tokenizer: PreTrainedTokenizerFast) -> None:
    with LLM(zoo.build("llama"), tokenizer=tokenizer, block_size=4, max_model_len=8, scheduler="priority") as llm:
        for given in ANY_NUMBER:
            params = SamplingParams(**{"max_tokens": 4, "ignore_eos": True, **given})
            (output,) = llm.generate([[5, 6]], params, use_tqdm=False, priority=[2**70])
            assert {one.finish_reason for one in output.outputs} == {"length"}, given
