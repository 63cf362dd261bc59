"""Prompt → engine requests, and finished requests → RequestOutput."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from tqdm import tqdm

from hf_paged.engine.thread import EngineThread
from hf_paged.errors import ConfigError, EngineClosedError, RequestAbortedError, RequestFailedError, first_line
from hf_paged.hf import notices
from hf_paged.params import SamplingParams, is_integer
from hf_paged.request import CompletionOutput, Logprob, Request, RequestOutput
from hf_paged.text.output import OutputText
from hf_paged.text.prompts import ReadPrompt
from hf_paged.text.tokens import TokenTexts

_numbers = itertools.count()


class Carried:
    """A prompt that is carried: its `params.n` requests, which share the prompt's blocks.

    Args:
        prompt: its ids, its text if it has one, and the salt of its blocks.
        params: how it is continued.
        eos: ids that end a sequence.
        texts: of the tokens; None: there is no tokenizer.
        priority: under the scheduler "priority"; the smallest runs first.
        banned: the token sequences of `params.bad_words`.
    """

    def __init__(
        self,
        prompt: ReadPrompt,
        params: SamplingParams,
        eos: frozenset[int],
        texts: TokenTexts | None,
        *,
        priority: int = 0,
        banned: tuple[tuple[int, ...], ...] = (),
    ) -> None:
        self.text = prompt.text
        self._texts = texts
        self._outputs: list[OutputText] = []
        self.requests: list[Request] = []
        number, tokenizer = next(_numbers), texts.tokenizer if texts else None
        for i in range(params.n):
            request = Request(
                request_id=f"llm-{number}-{i}",
                prompt_token_ids=prompt.ids,
                params=params.replace(seed=params.seed + i) if params.seed is not None else params,
                eos_token_ids=eos,
                priority=priority,
                banned=banned,
                cache_key=prompt.cache_salt,
                parent=self.requests[0] if self.requests else None,
            )
            output = OutputText(tokenizer, prompt.ids, params, eos)
            if params.stop:
                request.stop_check = output.stop_check
            self._outputs.append(output)
            self.requests.append(request)

    @property
    def error(self) -> BaseException | None:
        """What ended one of its requests, or None."""
        return next((request.error for request in self.requests if request.error is not None), None)

    def output(self) -> RequestOutput:
        """What came of it."""
        first = self.requests[0]
        return RequestOutput(
            request_id=first.request_id,
            prompt=self.text,
            prompt_token_ids=first.prompt_token_ids,
            outputs=[self._completion(index, request) for index, request in enumerate(self.requests)],
            finished=True,
            prompt_logprobs=self._named(first.prompt_logprobs),
            metrics=first.metrics,
            num_cached_tokens=first.num_cached or 0,
        )

    def _completion(self, index: int, request: Request) -> CompletionOutput:
        output = self._outputs[index]  # with stop strings most of it is decoded already
        output.add(request.output_token_ids[output.num_tokens :], request.finish_reason or "abort")
        return CompletionOutput(
            index=index,
            text=output.text,
            token_ids=request.output_token_ids,
            cumulative_logprob=request.cumulative_logprob,
            logprobs=self._named(request.logprobs),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            error=request.error,
        )

    def _named(self, entries: Any) -> Any:
        """Log-probabilities with the text of each token."""
        if entries is None or self._texts is None:
            return entries
        name = self._texts.name
        return [entry and {i: Logprob(x.logprob, x.rank, name(i)) for i, x in entry.items()} for entry in entries]


def params_for_each(given: Any, count: int, default: Callable[[], SamplingParams]) -> list[SamplingParams]:
    """One SamplingParams for each of `count` prompts, from one for all or a list; None stands for the default.

    Raises:
        ConfigError: they are none, or more or fewer than the prompts, or the default is asked for and is wrong.
    """
    if given is None or isinstance(given, SamplingParams):
        return [given or default()] * count
    each = _one_for_each("sampling_params", given, count, "a SamplingParams, a list of them, or None")
    for index, params in enumerate(each):
        if params is not None and not isinstance(params, SamplingParams):
            raise ConfigError(f"sampling_params[{index}] must be a SamplingParams or None, got {params!r:.80}")
    return [params or default() for params in each]


def priority_for_each(given: Any, count: int, scheduler: str) -> list[int]:
    """A priority for each of `count` prompts; None stands for 0.

    Raises:
        ConfigError: they are no integers, more or fewer than the prompts, or of no effect under the scheduler.
    """
    if given is None:
        return [0] * count
    each = _one_for_each("priority", given, count, "a list of integers, or None")
    for index, priority in enumerate(each):
        if priority is not None and not is_integer(priority):
            raise ConfigError(f"priority[{index}] must be an integer or None, got {priority!r:.80}")
        if priority and scheduler == "fcfs":
            raise ConfigError(
                f"priority[{index}]={priority} has no effect under scheduler={scheduler!r}; build the LLM with "
                "scheduler='priority', or leave it out"
            )
    return [int(priority or 0) for priority in each]


def _one_for_each(name: str, given: Any, count: int, wanted: str) -> list[Any]:
    """A list, or an array, of `count` entries."""
    if hasattr(given, "tolist"):  # an array of numpy or torch
        given = given.tolist()
    if not isinstance(given, Iterable) or isinstance(given, (str, bytes, Mapping)):
        raise ConfigError(f"{name} must be {wanted}, got {given!r:.80}")
    each = list(given)
    if len(each) != count:
        raise ConfigError(f"{name} has {len(each)} entries for {count} prompts; give one for each")
    return each


def carry(thread: EngineThread, carried: Sequence[Carried], *, raise_on_error: bool) -> None:
    """Run prompts to completion; one that fails doesn't affect the others, and a warning reports it.

    Those that may have the longest outputs are begun first.

    Raises:
        RequestFailedError: one failed, under `raise_on_error`; the others are aborted then.
        EngineClosedError, RequestAbortedError: the engine was closed meanwhile.
    """
    requests = sorted((request for one in carried for request in one.requests), key=_longest_first)
    now = time.monotonic()
    for request in requests:  # one arrival time for all, so that only priority orders them
        request.metrics.arrival_time = now
    with thread.call(requests) as call:
        call.wait(lambda: all(r.finished for r in requests) or (raise_on_error and any(r.error for r in requests)))
        failed = [(index, one.error) for index, one in enumerate(carried) if one.error is not None]
    for _, error in failed:
        if isinstance(error, (EngineClosedError, RequestAbortedError)) or not isinstance(error, Exception):
            raise error
    if not failed:
        return
    index, error = failed[0]
    if raise_on_error:
        raise RequestFailedError(index, error) from error
    # Warn: programs that don't check finish reasons would take the empty text for an answer.
    notices.warn(
        f"{len(failed)} of {len(carried)} prompts failed; their finish_reason is 'error'. The first is prompt {index}: "
        f"{first_line(error)}. With raise_on_error=True this is an exception"
    )


def _longest_first(request: Request) -> float:
    return -(request.params.max_tokens or math.inf)


class Progress:
    """The progress bar: prompts done, with input and output tokens a second.

    Args:
        prompts: that are carried.
        show: whether there is one, or what makes it in tqdm's place, with tqdm's arguments.
    """

    def __init__(self, prompts: Sequence[Carried], show: bool | Callable[..., Any]) -> None:
        make = show if callable(show) else functools.partial(tqdm, disable=not show)
        self._bar = make(total=len(prompts), desc="Processed prompts", dynamic_ncols=True)
        self._began = time.monotonic()
        self._input = self._output = 0
        for prompt in prompts if show else ():
            left = [len(prompt.requests)]
            for request in prompt.requests:
                request.on_token = lambda request, left=left: self._update(request, left)

    def _update(self, request: Request, left: list[int]) -> None:
        if not request.finished:
            return
        self._output += request.num_output
        left[0] -= 1
        if left[0] == 0:
            self._input += len(request.prompt_token_ids)
            seconds = max(time.monotonic() - self._began, 1e-9)
            self._bar.set_postfix_str(
                f"est. speed input: {self._input / seconds:.2f} toks/s, output: {self._output / seconds:.2f} toks/s"
            )
            self._bar.update(1)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
