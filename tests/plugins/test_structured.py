"""Structured output: what is asked for is all that comes out, and nothing else changes."""

from __future__ import annotations

import gc
import json
import random
import re

import numpy as np
import psutil
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import hf_paged_structured
import schemas
import zoo
from hf_paged import LLM, ConfigError, InvalidRequestError, SamplingParams, StructuredOutputs, plugins
from hf_paged.request import Request
from hf_paged.text.defaults import end_ids

pytest.importorskip("llguidance")
import llguidance

from hf_paged_structured import trial
from hf_paged_structured.constraint import Ahead
from hf_paged_structured.processor import apply

VOCAB = 400
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE with merges that cross JSON's punctuation; its end of sequence is the zoo's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    r = random.Random(1)
    made.train_from_iterator([json.dumps(schemas.schema(r)) for _ in range(50)], trainer)
    assert made.token_to_id("<eos>") == zoo.EOS
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def model():
    """The zoo's Llama with a vocabulary that holds every byte."""
    config = zoo.tiny_config("llama", 2)
    config.vocab_size = VOCAB
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = zoo.model_class("llama")(config).float().eval()
    made.generation_config.update(pad_token_id=zoo.PAD, bos_token_id=zoo.BOS, eos_token_id=zoo.EOS)
    return made


@pytest.fixture
def llm(tokenizer):
    with LLM(model(), tokenizer=tokenizer) as llm:
        yield llm


def wanting(max_tokens=80, temperature=0.0, **fields):
    names = ("json", "regex", "choice", "grammar", "json_object")
    wanted = StructuredOutputs(**{name: fields.pop(name) for name in names if name in fields})
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, structured_outputs=wanted, **fields)


def answers(llm, params, prompts=None):
    prompts = prompts or [f"Prompt {index}" for index in range(len(params))]
    return [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]


def request_for(llm, prompt, params, so_far=()):
    """A request as `LLM` makes it, and the thread for it; with output tokens to begin with."""
    built, thread = llm._patched.engine()
    request = Request(
        "mine-" + prompt,
        llm.tokenizer.encode(prompt),
        params,
        end_ids(llm.model.generation_config.eos_token_id, llm.tokenizer),
    )
    plugins.constrain(built.manager, request, llm.tokenizer)
    request.token_ids += so_far
    return request, thread


# ------------------------------------------------------------------------------------------------------------- answers


def test_every_finished_answer_validates(llm):
    r = random.Random(0)
    wanted = [schemas.schema(r) for _ in range(40)]
    params = [wanting(200, 1.0, seed=seed, json=one) for seed, one in enumerate(wanted)]
    found = answers(llm, params)
    finished = [(one, got.text) for one, got in zip(wanted, found, strict=True) if got.finish_reason == "stop"]
    assert len(finished) > 30
    assert not schemas.problems(finished)


def test_the_random_schemas_are_told_from_answers_that_do_not_fit():
    r = random.Random(0)
    wanted = [schemas.schema(r) for _ in range(40)]
    assert len(schemas.problems([(one, '{"surprise": 1}') for one in wanted])) == 40


def test_json_object(llm):
    for got in answers(llm, [wanting(300, 1.0, seed=seed, json_object=True) for seed in range(8)]):
        if got.finish_reason == "stop":
            assert isinstance(json.loads(got.text), dict)
        assert got.text.lstrip().startswith("{")


def test_regex_choice_and_grammar(llm):
    lark = 'start: sum\nsum: /[1-9]/ "+" /[1-9]/ "=?"'
    gbnf = 'root ::= "<" [a-c] [a-c] ">"'
    params = [wanting(regex=r"[a-f]{3}-\d{2}"), wanting(choice=["yes", "no way"]), wanting(grammar=lark)]
    found = answers(llm, [*params, wanting(grammar=gbnf)])
    patterns = (r"[a-f]{3}-\d{2}", "yes|no way", r"[1-9]\+[1-9]=\?", "<[a-c]{2}>")
    assert all(re.fullmatch(p, got.text) for p, got in zip(patterns, found, strict=True)), [got.text for got in found]
    assert {got.finish_reason for got in found} == {"stop"}


def test_a_complete_output_ends_without_an_end_of_sequence_even_at_the_last_token(llm):
    (free,) = answers(llm, [wanting(regex="[ab]{6}")])
    assert zoo.EOS not in free.token_ids
    (tight,) = answers(llm, [wanting(len(free.token_ids), regex="[ab]{6}")])
    assert (tight.text, tight.finish_reason) == (free.text, "stop")
    (short,) = answers(llm, [wanting(len(free.token_ids) - 1, regex="[ab]{6}")])
    assert short.finish_reason == "length"


def test_end_of_sequence_is_drawn_only_where_the_grammar_accepts(llm):
    favoured = {zoo.EOS: 100.0}
    (got,) = answers(llm, [wanting(regex="a{4}b*", logit_bias=favoured)])
    assert got.text == "aaaa"
    assert got.finish_reason == "stop"


def test_completions_of_one_prompt_have_matchers_of_their_own(llm):
    params = wanting(temperature=1.5, seed=3, n=4, regex="[a-z]{5}")
    (output,) = llm.generate(["Prompt"], params, use_tqdm=False)
    texts = [one.text for one in output.outputs]
    assert len(set(texts)) > 1
    assert all(re.fullmatch("[a-z]{5}", text) for text in texts)


def test_min_tokens_and_stop_strings(llm):
    (got,) = answers(llm, [wanting(regex="a+", min_tokens=6, logit_bias={zoo.EOS: 100.0})])
    assert len(got.token_ids) >= 6
    (got,) = answers(llm, [wanting(regex="xyxyQ*", min_tokens=0, stop="yx")])
    assert (got.text, got.finish_reason, got.stop_reason) == ("x", "stop", "yx")


# ------------------------------------------------------------------------------------------------------------ the batch


def test_others_in_the_batch_answer_as_alone(llm):
    plain = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    (alone,) = answers(llm, [plain], ["Something else"])
    mixed = answers(llm, [wanting(json=PERSON), plain, wanting(choice=["a", "b"])], ["One", "Something else", "Two"])
    assert mixed[1].token_ids == alone.token_ids
    assert answers(llm, [wanting(json=PERSON)], ["One"])[0].token_ids == mixed[0].token_ids


def test_a_request_resumes_anywhere_in_its_answer(llm):
    params = wanting(json=PERSON)
    whole, thread = request_for(llm, "Resume", params)
    thread.run([whole])
    assert whole.finish_reason == "stop"
    assert whole.num_output > 8
    for count in range(1, whole.num_output):
        again, thread = request_for(llm, "Resume", params, whole.output_token_ids[:count])
        thread.run([again])
        assert again.token_ids == whole.token_ids
        assert again.finish_reason == "stop"


def test_preempted_requests_keep_their_place(tokenizer):
    params = [wanting(60, 1.0, seed=seed, json=PERSON) for seed in range(6)]
    with LLM(model(), tokenizer=tokenizer) as llm:
        expected = [got.token_ids for got in answers(llm, params)]
    with LLM(model(), tokenizer=tokenizer, num_blocks=20, block_size=4) as llm:
        assert [got.token_ids for got in answers(llm, params)] == expected
        assert llm.stats.num_preemptions > 0


def test_masks_are_computed_ahead(llm, monkeypatch):
    asked, computed = [], []
    ask, compute = Ahead.ask, Ahead.compute
    monkeypatch.setattr(Ahead, "ask", lambda self, one: (asked.append(one), ask(self, one))[1])
    monkeypatch.setattr(Ahead, "compute", lambda self, all_: (computed.extend(all_), compute(self, all_))[1])
    got = answers(llm, [wanting(json=PERSON), wanting(json=PERSON)])
    steps = sum(len(one.token_ids) for one in got)
    assert len(computed) == steps  # none twice
    assert len(asked) == steps - 2  # all but the first of each


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"type": "object", "properties": {"a": {"not": {}}}}}, "not"),
        ({"json": {"type": "string", "format": "shoe-size"}}, "shoe-size"),
        ({"json": {"$ref": "http://localhost/schema"}}, "http://localhost/schema"),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 1}}, "minimum"),
        ({"json": '{"type": '}, "structured_outputs.json"),
        ({"json": "[1]"}, "a schema is an object"),
        ({"regex": "(?=a)b"}, "look-ahead"),
        ({"regex": "(a"}, "unclosed group"),
        ({"grammar": "start: thing"}, "unknown name"),
    ],
)
def test_what_can_not_be_kept_to_is_refused_and_named(llm, wanted, words):
    with pytest.raises(InvalidRequestError, match=re.escape(words)) as raised:
        answers(llm, [SamplingParams(), SamplingParams(structured_outputs=wanted)])
    assert str(raised.value).startswith("prompt 1: structured_outputs.")


def test_a_dead_end_fails_its_request_alone(llm):
    (a,) = llm.tokenizer.encode("a")
    dead, thread = request_for(llm, "Dead", wanting(regex="bbb", allowed_token_ids=[a]))
    other, _ = request_for(llm, "Other", wanting(regex="[ab]{3}"))
    with thread.call([dead, other]) as call:
        call.wait(lambda: dead.finished and other.finished)
    assert dead.finish_reason == "error"
    assert "no token may be drawn as token 1" in str(dead.error)
    assert re.fullmatch("[ab]{3}", llm.tokenizer.decode(other.output_token_ids))


def test_a_model_without_an_end_of_sequence_needs_stop_token_ids(llm):
    llm.model.generation_config.eos_token_id = None
    llm.tokenizer.eos_token = None
    try:
        with pytest.raises(InvalidRequestError, match=r"needs an end-of-sequence id.*has \[\]"):
            answers(llm, [wanting(regex="a")])
        (got,) = answers(llm, [wanting(regex="a{3}b*", stop_token_ids=[zoo.EOS], logit_bias={zoo.EOS: 100.0})])
        assert (got.token_ids[-1], got.stop_reason) == (zoo.EOS, zoo.EOS)
    finally:
        llm.tokenizer.eos_token = "<eos>"


def test_without_a_tokenizer_it_is_refused():
    with LLM(model(), skip_tokenizer_init=True) as llm, pytest.raises(ConfigError, match="needs a fast tokenizer"):
        llm.generate([[5]], wanting(regex="a"), use_tqdm=False)


def test_a_tokenizer_that_can_not_be_read_is_said_to_be(llm):
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordPiece({"a": 0, "b": 1, "##c": 2}, unk_token="a")), eos_token="b"
    )
    request = Request("words", [0], wanting(regex="a"), frozenset([1]))
    with pytest.raises(ConfigError, match="can't be kept to with this tokenizer"):
        plugins.constrain(llm._patched.engine()[0].manager, request, words)


def test_without_the_library_it_is_silent_until_asked_for(monkeypatch, tokenizer):
    monkeypatch.setattr(hf_paged_structured, "find_spec", lambda name: None)
    with LLM(model(), tokenizer=tokenizer) as llm:
        answers(llm, [SamplingParams(max_tokens=2)])
        with pytest.raises(ConfigError, match=r"pip install '.\[structured\]'"):
            answers(llm, [wanting(regex="a")])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object; got none"),
        ({"regex": "a", "json": {}}, "got json, regex"),
        ({"json_object": False}, "got none"),
        ({"choice": []}, "choice must be a list of at least one text"),
        ({"choice": "ab"}, "choice must be a list"),
        ({"regex": 3}, "regex must be a text"),
        ({"json": 3}, "json must be a schema"),
        ({"xml": "a"}, "has no 'xml'"),
    ],
)
def test_parameters_that_contradict_themselves(fields, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        SamplingParams(structured_outputs=fields)


def test_ignore_eos_is_refused():
    with pytest.raises(ConfigError, match="ignore_eos=True contradicts structured_outputs"):
        wanting(regex="a", ignore_eos=True)


# --------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("width", [40, 64, 70])
def test_masks_narrower_and_wider_than_the_logits(width):
    r = np.random.default_rng(0)
    masks = [r.integers(-(2**31), 2**31, 2, dtype=np.int64).astype(np.int32) for _ in range(2)]
    logits = torch.randn(3, width)
    expected = logits.clone()
    for row, mask in zip((0, 2), masks, strict=True):
        for token in range(width):
            if token >= 64 or not mask[token // 32] >> (token % 32) & 1:
                expected[row, token] = -torch.inf
    apply(logits, [0, 2], masks)
    assert torch.equal(logits, expected)


class Panic(BaseException):
    """As Rust's panics come: not an Exception."""


class BrokenExecutor:
    """Panics over the matchers of some constraints."""

    def __init__(self, bad):
        self.bad = {id(constraint.matcher) for constraint in bad}
        self.executor = llguidance.LLExecutor()

    def unsafe_compute_mask_ptr(self, matchers, *where):
        if self.bad & {id(matcher) for matcher, _ in matchers}:
            raise Panic("index out of bounds")
        self.executor.unsafe_compute_mask_ptr(matchers, *where)


def test_a_mask_that_can_not_be_computed_costs_its_request_alone(llm, monkeypatch):
    bad, thread = request_for(llm, "Bad", wanting(regex="[ab]{6}"))
    good, _ = request_for(llm, "Good", wanting(regex="[ab]{6}"))
    init = Ahead.__init__

    def broken(self):
        init(self)
        self._executor = BrokenExecutor([bad.constraint])

    monkeypatch.setattr(Ahead, "__init__", broken)
    with thread.call([bad, good]) as call:
        call.wait(lambda: bad.finished and good.finished)
    assert (bad.finish_reason, good.finish_reason) == ("error", "stop")
    assert "index out of bounds" in str(bad.error)


def test_a_thread_that_breaks_off_leaves_nobody_waiting(llm):
    one, _ = request_for(llm, "One", wanting(regex="[ab]{6}"))
    ahead = Ahead()
    ahead.compute = lambda constraints: (_ for _ in ()).throw(Panic("broken off"))
    for _ in range(2):
        ahead.ask(one.constraint)
        ahead.wait_for([one.constraint])
    assert "broken off" in str(one.constraint.error)
    ahead._threads.shutdown()
    ahead.ask(one.constraint)  # as at the interpreter's end
    ahead.wait_for([one.constraint])


def test_a_batch_that_does_not_concern_it_is_not_touched(llm):
    _, thread = llm._patched.engine()
    (processor,) = [p for p in thread.engine._sampler._processors if type(p).__name__ == "StructuredProcessor"]
    request = Request("plain", [1])
    logits = torch.randn(1, 5)
    assert not processor.concerns(request)
    assert processor.process([request], logits) is logits
    assert processor._ahead is None  # no thread either


# ------------------------------------------------------------------------------------------- what could end the process


def chained(count):
    """A schema of references to references."""
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(count)}
    return {"$defs": {**links, f"d{count}": {"type": "boolean"}}, "$ref": "#/$defs/d0"}


def rules(count):
    return "\n".join(["root ::= r0", *(f"r{i} ::= r{i + 1}" for i in range(count)), f'r{count} ::= "a"'])


@pytest.mark.parametrize(
    "wanted", [{"json": chained(3000)}, {"json": json.dumps(chained(20_000))}], ids=["map", "text"]
)
def test_a_schema_that_would_overflow_the_stack_is_refused(llm, wanted, monkeypatch):
    """By each request that asks for it, and tried once."""
    tried, original = [], trial.Trials.problem_of
    monkeypatch.setattr(trial.Trials, "problem_of", lambda *given: (tried.append(given), original(*given))[1])
    for _ in range(3):
        with pytest.raises(InvalidRequestError, match="json can't be kept to: it nests or chains its rules too deeply"):
            answers(llm, [wanting(**wanted)])
    assert len(tried) == 1
    (got,) = answers(llm, [wanting(regex="a{3}")])
    assert got.text == "aaa"


@pytest.mark.parametrize(
    "wanted",
    [
        {"json": "[" * 100_000},
        {"json": '{"items":' * 3000 + "{}" + "}" * 3000},
        {"regex": "(" * 50_000 + "a" + ")" * 50_000},
        {"regex": "a" * 2**21},
        {"choice": [str(i) * 20 for i in range(100_000)]},
    ],
    ids=["brackets", "items", "groups", "long", "choices"],
)
def test_a_grammar_that_is_too_deep_or_long_is_refused(llm, wanted):
    with pytest.raises(InvalidRequestError, match="can't be kept to") as raised:
        answers(llm, [wanting(**wanted)])
    assert len(str(raised.value)) < 500


def test_a_long_grammar_that_compiles(llm):
    (schema, grammar) = answers(llm, [wanting(json=chained(200)), wanting(grammar=rules(300))])
    assert schema.text in ("true", "false")
    assert grammar.text == "a"


def test_a_grammar_that_takes_too_long_is_given_up(llm, monkeypatch):
    properties = {f"p{index}": {"type": "string"} for index in range(3000)}  # compiled in more than a second
    monkeypatch.setattr(trial, "SECONDS", 0.05)
    with pytest.raises(InvalidRequestError, match="it takes more than 0.05 s to compile"):
        answers(llm, [wanting(json={"type": "object", "properties": properties})])
    monkeypatch.undo()
    (got,) = answers(llm, [wanting(json=chained(202))])
    assert got.text in ("true", "false")


def test_processes_of_trials_end_with_their_owner(tokenizer):
    trials = trial.Trials(tokenizer.backend_tokenizer.to_str(), [zoo.EOS])
    assert trials.problem_of('start: "a"') is None
    (process,) = trials._idle
    child = psutil.Process(process._process.pid)
    del process, trials
    gc.collect()
    assert not child.is_running()
