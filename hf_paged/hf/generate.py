"""One patched `generate()` call, from its arguments to its result."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from hf_paged.engine.thread import EngineThread
from hf_paged.errors import EngineClosedError, RequestAbortedError
from hf_paged.hf import lockstep
from hf_paged.hf.compat import decoder_output
from hf_paged.hf.noise import CallNoise
from hf_paged.hf.prepare import Prepared
from hf_paged.hf.replay import ReplayedCache
from hf_paged.hf.rowwise import RowwiseSampler, is_plain, is_rowwise
from hf_paged.params import SamplingParams
from hf_paged.protocols import TokenSampler
from hf_paged.request import Request

_ids = itertools.count()


@torch.no_grad()
def generate(model: PreTrainedModel, call: Prepared, thread: EngineThread) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """Answer a prepared call on the engine, with stock's result: shape, padding, dtype and device."""
    scores = logits = None
    if is_plain(call):
        requests = _requests(call, None)
        thread.run(requests)
        sequences = _padded(call, requests)
    elif is_rowwise(call):
        sequences = _run_rowwise(model, call, thread)
    else:
        handoff = lockstep.Handoff(thread.engine.model.spec.device)
        requests = _requests(call, handoff, ends_itself=False)
        sequences, scores, logits = lockstep.run(call, thread, requests, handoff)
    if call.streamer is not None:
        call.streamer.end()
    if not call.config.return_dict_in_generate:
        return sequences
    cache = ReplayedCache(model, sequences, call.visible) if call.config.use_cache else None
    return decoder_output(sequences, scores, logits, cache)


def _run_rowwise(model: PreTrainedModel, call: Prepared, thread: EngineThread) -> torch.Tensor:
    noise = None
    if call.config.do_sample:
        noise = CallNoise(len(call.prompts), thread.engine.model.num_logits, call.input_ids.device)
    try:
        requests = _requests(call, None)
        sampler = RowwiseSampler(call, requests, noise)
        for request in requests:
            request.sampler = sampler
        thread.run(requests)
    except BaseException as error:
        if noise is not None:  # after an engine that was closed the call is answered by another, or by stock
            noise.close(drawn=not isinstance(error, (EngineClosedError, RequestAbortedError)))
        raise
    if noise is not None:
        noise.close()
    return _padded(call, requests)


def _requests(call: Prepared, sampler: TokenSampler | None, *, ends_itself: bool = True) -> list[Request]:
    """A request for each row; rows with the same prompt share its blocks."""
    params = SamplingParams(
        temperature=0.0, max_tokens=call.max_new_tokens, ignore_eos=not ends_itself, detokenize=False
    )
    number = next(_ids)
    requests: list[Request] = []
    for index, prompt in enumerate(call.prompts):
        first = index - index % call.copies
        requests.append(
            Request(
                request_id=f"generate-{number}-{index}",
                prompt_token_ids=prompt,
                params=params,
                eos_token_ids=call.eos_token_ids,
                sampler=sampler,
                parent=requests[first] if index > first else None,
            )
        )
    return requests


def _padded(call: Prepared, requests: Sequence[Request]) -> torch.Tensor:
    """The padded prompts and their answers: int64 [rows, width + longest answer]."""
    longest = max(request.num_output for request in requests)
    pad = int(call.config._pad_token_tensor) if call.config._pad_token_tensor is not None else 0
    answers = [request.output_token_ids + [pad] * (longest - request.num_output) for request in requests]
    tail = torch.tensor(answers, dtype=torch.int64, device=call.input_ids.device)
    return torch.cat([call.input_ids, tail], dim=-1)
