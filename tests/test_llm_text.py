"""LLM: messages as the server prepares them, ends that are no text, failing prompts, copies of a prompt."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tiny

import zoo
from hf_paged import LLM, InvalidRequestError, RequestFailedError, SamplingParams
from hf_paged.llm_requests import Carried
from hf_paged.text.prompts import ReadPrompt
from hf_paged.text.templates import render

GREEDY = SamplingParams(temperature=0.0, max_tokens=4)
SHOWS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% endif %}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}{% for part in m.content %}"
    "{% if part.type == 'text' %}<{{ part.text }}>{% endif %}{% endfor %}{% endfor %}"
)
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}


@pytest.fixture(scope="module")
def llm() -> Any:
    with LLM(zoo.build("llama"), tokenizer=tiny.tokenizer(), block_size=4) as made:
        yield made


def prompt(llm: LLM, *messages: Any, template: str = SHOWS) -> str:
    (output,) = llm.chat(list(messages), GREEDY, use_tqdm=False, chat_template=template, add_generation_prompt=False)
    assert output.prompt is not None
    return output.prompt


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "[user]a\nb"),
        ({"role": "user", "content": ["a", {"type": "input_text", "text": "b"}]}, "[user]a\nb"),
        ({"role": "developer", "content": "a"}, "[system]a"),
        ({"role": "assistant", "content": "a", "tool_calls": []}, "[assistant]a"),
        ({"role": "assistant", "content": "a", "tool_calls": None, "annotations": []}, "[assistant]a"),
        ({"role": "assistant", "content": None, "refusal": "no"}, "[assistant]no"),
        ({"role": "function", "name": "f", "content": "1"}, "[tool]1"),
    ],
)
def test_messages(llm: LLM, message: dict[str, Any], shown: str) -> None:
    assert prompt(llm, message) == shown


def test_one_message_is_a_conversation(llm: LLM) -> None:
    message = {"role": "user", "content": "a"}
    expected = llm.chat([message], GREEDY, use_tqdm=False)[0].prompt
    assert [output.prompt for output in llm.chat(message, GREEDY, use_tqdm=False)] == [expected]
    assert llm.chat([], GREEDY, use_tqdm=False) == []


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ("hello", "messages must be a conversation, or a list of them, got 'hello'"),
        (None, "messages must be a conversation, or a list of them, got None"),
        ([[{"role": "user", "content": "a"}], {"role": "user"}], "conversation 1 must be a list of messages"),
        ([[{"role": "user", "content": "a"}], [{"role": "user", "content": "\ud800"}]], "conversation 1: the text has"),
    ],
)
def test_what_is_no_conversation_is_refused(llm: LLM, messages: Any, why: str) -> None:
    with pytest.raises(InvalidRequestError, match=why):
        llm.chat(messages, GREEDY)


@pytest.mark.parametrize("call", [{"tool_calls": [CALL]}, {"function_call": CALL["function"]}])
def test_arguments_are_not_encoded_twice(llm: LLM, call: dict[str, Any]) -> None:
    text = prompt(llm, {"role": "assistant", "content": None, **call}).removeprefix("[assistant]")
    assert json.loads(text)[0]["function"] == {"name": "f", "arguments": {"x": 1}}


def test_templates_that_take_parts_get_them(llm: LLM) -> None:
    assert prompt(llm, {"role": "user", "content": "a"}, template=PARTS) == "<a>"


@pytest.mark.parametrize(
    "message",
    ["text", {"content": "a"}, {"role": "user", "content": 5}, {"role": "user", "content": [{"type": "image_url"}]}],
)
def test_what_is_no_message_is_refused(llm: LLM, message: Any) -> None:
    with pytest.raises(InvalidRequestError, match="conversation 0: "):
        llm.chat([{"role": "user", "content": "x"}, message], GREEDY)


def test_openais_answers_are_messages() -> None:
    from openai.types.chat import ChatCompletionMessage

    answer = ChatCompletionMessage(role="assistant", content="a")
    assert render(tiny.tokenizer(), [answer], chat_template=SHOWS, add_generation_prompt=False) == "[assistant]a"


def test_parts_of_openais_answers_are_parts_of_messages() -> None:
    from openai.types.chat import ChatCompletionMessage
    from openai.types.responses import ResponseOutputText

    answer = ChatCompletionMessage.model_validate({"role": "assistant", "content": None, "tool_calls": [CALL]})
    assert answer.tool_calls is not None
    (call,) = answer.tool_calls
    old = {"function_call": call.function}  # type: ignore[union-attr]
    for calls in ({"tool_calls": answer.tool_calls}, {"tool_calls": [{**CALL, "function": old["function_call"]}]}, old):
        message = {"role": "assistant", "content": None, **calls}
        text = render(tiny.tokenizer(), [message], chat_template=SHOWS, add_generation_prompt=False)
        assert json.loads(text.removeprefix("[assistant]"))[0]["function"] == {"name": "f", "arguments": {"x": 1}}
    part = ResponseOutputText(type="output_text", text="a", annotations=[])
    message = {"role": "assistant", "content": [part]}
    assert render(tiny.tokenizer(), [message], chat_template=SHOWS, add_generation_prompt=False) == "[assistant]a"


@pytest.mark.parametrize("calls", [5, "f", CALL])
def test_tool_calls_that_are_no_list(calls: Any) -> None:
    with pytest.raises(InvalidRequestError, match="tool_calls must be a list of tool calls, got "):
        render(tiny.tokenizer(), [{"role": "assistant", "content": "", "tool_calls": calls}], chat_template=SHOWS)


def test_copies_of_a_prompt_have_its_log_probabilities() -> None:
    """Each of them its own: they are told of each by the server."""
    params = SamplingParams(n=3, seed=1, prompt_logprobs=1)
    with LLM(zoo.build("llama"), skip_tokenizer_init=True, block_size=4) as llm:
        carried = Carried(ReadPrompt(list(range(5, 40))), params, frozenset(), None)
        llm.engine()[1].run(carried.requests)
    first, *others = [request.prompt_logprobs for request in carried.requests]
    assert first is not None
    assert len(first) == 35
    for other in others:
        assert other is not None
        for entry, same in zip(other[1:], first[1:], strict=True):
            assert entry is not None
            assert same is not None
            expected = {token: pytest.approx(value.logprob, abs=1e-5) for token, value in same.items()}
            assert {token: value.logprob for token, value in entry.items()} == expected


def test_a_failing_prompt_costs_the_others_nothing() -> None:
    model = zoo.build("llama")

    def fails(module: Any, inputs: Any) -> None:
        if bool((inputs[0] == 77).any()):
            raise ValueError("77 is unlucky")

    with LLM(model, skip_tokenizer_init=True, block_size=4) as llm:
        alone = [llm.generate([ids], GREEDY, use_tqdm=False)[0].outputs[0].token_ids for ids in ([5, 6], [8, 9, 10])]
        assert 77 not in [token for ids in alone for token in ids]
        hook = model.get_input_embeddings().register_forward_pre_hook(fails)
        with pytest.warns(UserWarning, match="1 of 3 prompts failed; .* The first is prompt 1: 77 is unlucky"):
            outputs = llm.generate([[5, 6], [77, 78], [8, 9, 10]], GREEDY, use_tqdm=False)
        assert [output.outputs[0].finish_reason == "error" for output in outputs] == [False, True, False]
        assert [outputs[0].outputs[0].token_ids, outputs[2].outputs[0].token_ids] == alone
        assert str(outputs[1].outputs[0].error) == "77 is unlucky"
        with pytest.raises(RequestFailedError, match="prompt 1: 77 is unlucky") as raised:
            llm.generate([[5, 6], [77, 78]], GREEDY, use_tqdm=False, raise_on_error=True)
        assert raised.value.index == 1
        hook.remove()
        assert llm.stats.num_free == llm.stats.num_blocks


@pytest.mark.parametrize("top_k", [2**31, 2**40, 2**63])
def test_any_top_k(llm: LLM, top_k: int) -> None:
    params = SamplingParams(seed=1, max_tokens=4)
    ids = [llm.generate("x", p, use_tqdm=False)[0].outputs[0].token_ids for p in (params, params.replace(top_k=top_k))]
    assert ids[0] == ids[1]
