"""The official client over every endpoint and field, against SmolLM2."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from server.conftest import ServerProcess
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_paged

pytestmark = pytest.mark.slow

MODEL = "smollm2"
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "London"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("smollm2") / "log"
    options = ("--served-model-name", MODEL, "--api-key", "key-1", "--max-num-seqs", "16", "--no-spare-engine")
    started = ServerProcess(smollm2_dir, log, *options, "--max-model-len", "1024", "--option", "scheduler=priority")
    try:
        yield started.wait_ready()
    finally:
        assert started.stop() == 0


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="key-1", max_retries=0)


@pytest.fixture(scope="module")
def expected(smollm2_dir: Path) -> Any:
    """Offline greedy completion of a text."""
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    with hf_paged.LLM(model, tokenizer=tokenizer) as llm:

        def complete(prompt: Any, **params: Any) -> Any:
            given = hf_paged.SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **params})
            return llm.generate(prompt, given, use_tqdm=False)[0].outputs[0]

        yield complete


def test_completions(client: OpenAI, expected: Any) -> None:
    prompt = "The capital of France is"
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0)
    assert answer.choices[0].text == expected(prompt).text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8
    assert answer.object == "text_completion"
    assert len(client.completions.create(model=MODEL, prompt=prompt, temperature=0).choices[0].text) > 0  # 16 tokens


def test_completions_stream(client: OpenAI, expected: Any) -> None:
    prompt = "The capital of France is"
    options = {"include_usage": True}
    chunks = list(
        client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=8, temperature=0, stream=True, stream_options=options
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == expected(prompt).text
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 8
    assert chunks[-2].choices[0].finish_reason == "length"


def test_prompts_of_every_form(client: OpenAI, expected: Any) -> None:
    texts = ["One, two,", "Red, green,"]
    ids = [client.post("../tokenize", body={"prompt": t}, cast_to=dict[str, Any])["tokens"] for t in texts]
    wanted = [expected(text).text for text in texts]
    for prompt in (texts, ids):
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0)
        assert [choice.text for choice in answer.choices] == wanted
        assert [choice.index for choice in answer.choices] == [0, 1]
    answer = client.completions.create(model=MODEL, prompt=ids[0], max_tokens=8, temperature=0)
    assert [choice.text for choice in answer.choices] == wanted[:1]


def test_n_seed_and_reproducing(client: OpenAI) -> None:
    def draw(**options: Any) -> list[str]:
        answer = client.completions.create(model=MODEL, prompt="Once", max_tokens=8, temperature=1, **options)
        return [choice.text for choice in answer.choices]

    three = draw(n=3, seed=5)
    assert len(set(three)) == 3
    assert draw(n=3, seed=5) == three
    assert draw(seed=6) == three[1:2]  # child i has the seed + i
    assert draw() != draw()
    chunks = client.completions.create(
        model=MODEL, prompt="Once", max_tokens=8, temperature=1, n=3, seed=5, stream=True
    )
    texts = ["", "", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == three


def test_logprobs_and_echo(client: OpenAI, expected: Any) -> None:
    prompt = "The capital of France is"
    own = expected(prompt, logprobs=2)
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0, logprobs=2, echo=True)
    (choice,) = answer.choices
    assert choice.text == prompt + own.text
    logprobs = choice.logprobs
    assert logprobs
    assert logprobs.tokens
    assert logprobs.token_logprobs
    assert logprobs.top_logprobs
    assert "".join(logprobs.tokens) == choice.text
    assert logprobs.token_logprobs[0] is None
    values = [entry[token].logprob for entry, token in zip(own.logprobs, own.token_ids, strict=True)]
    assert logprobs.token_logprobs[-8:] == pytest.approx(values, abs=1e-3)
    assert all(len(top) == 2 for top in logprobs.top_logprobs[1:] if top)
    chat = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    content = chat.choices[0].logprobs.content
    assert "".join(entry.token for entry in content).startswith(chat.choices[0].message.content)
    assert all(len(entry.top_logprobs) == 3 and entry.top_logprobs[0].logprob >= entry.logprob for entry in content)


def test_stop(client: OpenAI, expected: Any) -> None:
    prompt = "One, two, three, four,"
    text = expected(prompt, max_tokens=24).text
    stop = text[7:11]
    for stream in (False, True):
        answer = client.completions.create(
            model=MODEL, prompt=prompt, max_tokens=24, temperature=0, stop=["nowhere", stop], stream=stream
        )
        choices = [c.choices[0] for c in answer] if stream else answer.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"
        assert choices[-1].stop_reason == stop
    kept = client.completions.create(
        model=MODEL,
        prompt=prompt,
        max_tokens=24,
        temperature=0,
        stop=stop,
        extra_body={"include_stop_str_in_output": True},
    )
    assert kept.choices[0].text == text[: text.index(stop) + len(stop)]


def test_vllms_fields(client: OpenAI, expected: Any) -> None:
    prompt = "The capital of France is"
    own = expected(prompt)

    def create(**extra: Any) -> Any:
        named = {name: extra.pop(name) for name in ("logit_bias", "max_tokens") if name in extra}
        options = {"max_tokens": 8, "temperature": 0} | named
        return client.completions.create(model=MODEL, prompt=prompt, extra_body=extra, **options).choices[0]

    first = own.token_ids[0]
    assert create(return_token_ids=True).token_ids == own.token_ids
    stopped = create(return_token_ids=True, stop_token_ids=[own.token_ids[2]])
    assert (stopped.token_ids, stopped.stop_reason) == (own.token_ids[:3], own.token_ids[2])
    assert create(return_token_ids=True, logit_bias={str(first): -100}).token_ids[0] != first
    assert create(return_token_ids=True, allowed_token_ids=[first]).token_ids == [first] * 8
    assert create(bad_words=["Paris"]).text != own.text
    assert "Paris" not in create(bad_words=["Paris"]).text
    assert create(repetition_penalty=1.8).text == expected(prompt, repetition_penalty=1.8).text
    assert len(create(ignore_eos=True, min_tokens=30, max_tokens=30, return_token_ids=True).token_ids) == 30
    assert create(top_k=1, temperature=1, seed=1).text == own.text
    assert create(min_p=1.0, temperature=1, seed=1).text == own.text
    assert create(cache_salt="a", priority=3, timeout=60, user="me", request_id="mine").text == own.text
    rated = create(prompt_logprobs=1)
    assert rated.prompt_logprobs[0] is None
    assert all(len(entry) in (1, 2) for entry in rated.prompt_logprobs[1:])
    cut = create(truncate_prompt_tokens=2, return_token_ids=True)
    assert len(cut.prompt_token_ids) == 2
    assert create(skip_special_tokens=False, spaces_between_special_tokens=False).text == own.text


def test_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_completion_tokens=16, temperature=0)
    message = answer.choices[0].message
    assert "Paris" in message.content
    assert (message.role, answer.choices[0].finish_reason) == ("assistant", "stop")
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    again = client.chat.completions.create(model=MODEL, messages=parts, max_tokens=16, temperature=0)
    assert again.choices[0].message.content == message.content
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            max_tokens=16,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == message.content
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens


def test_chat_of_its_own_kind(client: OpenAI) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": "The capital of"}]
    extra = {"add_generation_prompt": False, "continue_final_message": True}
    answer = client.chat.completions.create(
        model=MODEL, messages=begun, max_tokens=4, temperature=0, extra_body=extra, presence_penalty=0.1, n=1
    )
    assert answer.choices[0].message.content.startswith(" France")
    several = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=4, n=2, seed=1, temperature=1.5)
    assert [choice.index for choice in several.choices] == [0, 1]


def test_response_format(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "London"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=40, temperature=0, response_format=form
    )
    assert json.loads(answer.choices[0].message.content)["city"] in ("Paris", "London")
    extra = {"structured_outputs": {"choice": ["yes", "no"]}}
    chosen = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=40, temperature=0, extra_body=extra
    )
    assert chosen.choices[0].message.content in ("yes", "no")


def test_tools(client: OpenAI) -> None:
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        whole = ""
        for stream in (False, True):
            answer = client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "How is the weather in Paris?"}],
                tools=[WEATHER],
                tool_choice=choice,
                parallel_tool_calls=False,
                max_tokens=60,
                temperature=0,
                stream=stream,
            )
            if stream:
                deltas = [call for c in answer for call in c.choices[0].delta.tool_calls or []]
                assert [call.function.name for call in deltas if call.id] == ["get_weather"]
                assert len(deltas) > 3
                assert "".join(call.function.arguments for call in deltas) == whole
            else:
                (call,) = answer.choices[0].message.tool_calls
                whole = call.function.arguments
                assert answer.choices[0].finish_reason == "tool_calls"
                assert call.function.name == "get_weather"
                assert "city" in json.loads(whole)
    with client.chat.completions.stream(
        model=MODEL,
        messages=[{"role": "user", "content": "How is the weather in Paris?"}],
        tools=[WEATHER],
        tool_choice="required",
        max_tokens=60,
        temperature=0,
    ) as stream:  # puts the deltas together
        choice = stream.get_final_completion().choices[0]
    assert choice.message.tool_calls[0].function.name == "get_weather"
    assert choice.finish_reason == "tool_calls"
    history = [
        {"role": "user", "content": "Weather in Paris?"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    told = client.chat.completions.create(model=MODEL, messages=history, tools=[WEATHER], max_tokens=8, temperature=0)
    assert told.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_responses(client: OpenAI) -> None:
    answer = client.responses.create(
        model=MODEL, input=QUESTION[0]["content"], instructions="Be brief.", max_output_tokens=16, temperature=0
    )
    assert "Paris" in answer.output_text
    assert answer.status == "completed"
    with client.responses.stream(
        model=MODEL, input=QUESTION, instructions="Be brief.", max_output_tokens=16, temperature=0
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == answer.output_text
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    short = client.responses.create(model=MODEL, input="Tell me a story.", max_output_tokens=4, temperature=0)
    assert short.status == "incomplete"
    assert short.incomplete_details.reason == "max_output_tokens"
    tool = {"type": "function", "name": "get_weather", "parameters": WEATHER["function"]["parameters"]}
    forced = client.responses.create(
        model=MODEL,
        input="Weather in Paris?",
        tools=[tool],
        tool_choice="required",
        max_output_tokens=60,
        temperature=0,
    )
    (call,) = forced.output
    assert call.type == "function_call"
    assert "city" in json.loads(call.arguments)
    form = {"format": {"type": "json_schema", "name": "x", "schema": {"enum": ["a", "b"]}}}
    told = client.responses.create(
        model=MODEL,
        input=[
            *forced.to_dict()["output"],
            {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
        ],
        text=form,
        max_output_tokens=8,
    )
    assert json.loads(told.output_text) in ("a", "b")


def test_models_and_tokens(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == (MODEL, "model")
    assert client.models.retrieve(MODEL).id == MODEL
    ids = client.post("../tokenize", body={"prompt": "hello world"}, cast_to=dict[str, Any])
    assert ids["count"] == len(ids["tokens"])
    text = client.post("../detokenize", body={"tokens": ids["tokens"]}, cast_to=dict[str, Any])
    assert text["prompt"] == "hello world"
    chat = client.post("../tokenize", body={"messages": QUESTION}, cast_to=dict[str, Any])
    assert chat["count"] > 10


def test_errors(client: OpenAI, server: ServerProcess) -> None:
    def refused(kind: type[openai.APIStatusError], **options: Any) -> Any:
        with pytest.raises(kind) as caught:
            client.completions.create(**{"model": MODEL, "prompt": "x", **options})
        assert isinstance(caught.value.body, dict)
        return caught.value.body

    assert refused(openai.NotFoundError, model="other")["code"] == "model_not_found"
    assert refused(openai.BadRequestError, extra_body={"wrong": 1})["param"] == "wrong"
    assert refused(openai.BadRequestError, suffix="x")["param"] == "suffix"
    assert refused(openai.BadRequestError, temperature=3)["param"] == "temperature"
    assert refused(openai.BadRequestError, n=2, temperature=0)["param"] == "n"
    long = refused(openai.BadRequestError, prompt="a b c " * 200_000)
    assert "maximum context length is 1024" in long["message"]
    assert long["code"] == "context_length_exceeded"
    assert refused(openai.BadRequestError, max_tokens=1024)["code"] == "context_length_exceeded"
    assert refused(openai.BadRequestError, extra_body={"structured_outputs": {"regex": "("}})["message"]
    with pytest.raises(openai.AuthenticationError):
        OpenAI(base_url=f"{server.url}/v1", api_key="other").models.list()


def test_async_client(server: ServerProcess) -> None:
    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="key-1") as client:

            async def one(stream: bool) -> str:
                answer = await client.chat.completions.create(
                    model=MODEL, messages=QUESTION, max_tokens=12, temperature=0, stream=stream
                )
                if not stream:
                    return answer.choices[0].message.content
                return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

            return list(await asyncio.gather(*(one(number % 2 == 0) for number in range(6))))

    answers = asyncio.run(ask())
    assert len(set(answers)) == 1
