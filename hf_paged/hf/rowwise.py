"""Which of Transformers' processors and criteria rate each row by itself, so that rows may be at different steps."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process, stopping_criteria

from hf_paged.hf.compat import classes
from hf_paged.hf.noise import CallNoise
from hf_paged.hf.prepare import Prepared
from hf_paged.request import Request, Sampled

_PROCESSORS = (
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "ExponentialDecayLengthPenalty",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "MinPLogitsWarper",
    "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopHLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TypicalLogitsWarper",
)
_CRITERIA = ("MaxLengthCriteria", "MaxTimeCriteria", "EosTokenCriteria", "StopStringCriteria")
ROWWISE_PROCESSORS = classes(logits_process, _PROCESSORS)
ROWWISE_CRITERIA = classes(stopping_criteria, _CRITERIA)
_PLAIN_CRITERIA = frozenset((stopping_criteria.MaxLengthCriteria, stopping_criteria.EosTokenCriteria))


def is_plain(call: Prepared) -> bool:
    """Greedy, to a length or an end-of-sequence id: the engine needs no help."""
    chosen_by_itself = not call.config.do_sample and not call.processors
    return chosen_by_itself and not _watched(call) and all(type(c) in _PLAIN_CRITERIA for c in call.criteria)


def is_rowwise(call: Prepared) -> bool:
    """Whether rows may run at their own pace and leave the batch when they end.

    Where nothing pads finished rows, stock lets them run on until the last one has ended; that needs all of them.
    """
    pads = any(hasattr(c, "eos_token_id") for c in call.criteria)
    return (
        not _watched(call)
        and all(type(p) in ROWWISE_PROCESSORS for p in call.processors)
        and all(type(c) in ROWWISE_CRITERIA for c in call.criteria)
        and (pads or all(type(c) is stopping_criteria.MaxLengthCriteria for c in call.criteria))
    )


def _watched(call: Prepared) -> bool:
    """Whether the caller sees each step of the whole batch: through a streamer, or by its scores."""
    config = call.config
    wants_scores = config.return_dict_in_generate and (config.output_scores or config.output_logits)
    return call.streamer is not None or bool(wants_scores)


class RowwiseSampler:
    """Transformers' processors, criteria and random numbers, for the rows of one call at whatever step they are.

    Rows at the same step are processed together. A processor sees what stock would show it: the padded row.

    Args:
        call: the call.
        requests: its rows, in order.
        noise: where its random numbers come from, or None for greedy search.
    """

    def __init__(self, call: Prepared, requests: Sequence[Request], noise: CallNoise | None) -> None:
        self._processors: LogitsProcessorList = call.processors
        self._criteria: StoppingCriteriaList = call.criteria
        self._noise = noise
        self._prompts = call.input_ids
        self._row = {request: index for index, request in enumerate(requests)}

    def sample(self, requests: Sequence[Request], logits: torch.Tensor) -> Sampled:
        tokens, stopped = [0] * len(requests), [False] * len(requests)
        by_step: dict[int, list[int]] = {}
        for position, request in enumerate(requests):
            by_step.setdefault(request.num_output, []).append(position)
        for step, positions in by_step.items():
            group = [requests[position] for position in positions]
            chosen, ends = self._sample_step(step, group, logits[positions])
            for position, token, end in zip(positions, chosen, ends, strict=True):
                tokens[position], stopped[position] = token, end
        return Sampled(tokens, stopped)

    def _sample_step(
        self, step: int, requests: Sequence[Request], logits: torch.Tensor
    ) -> tuple[list[int], list[bool]]:
        device = self._prompts.device
        rows = torch.tensor([self._row[request] for request in requests], device=device)
        outputs = torch.tensor(
            [request.output_token_ids for request in requests], dtype=self._prompts.dtype, device=device
        )
        input_ids = torch.cat([self._prompts[rows], outputs.view(len(requests), step)], dim=-1)
        processors = LogitsProcessorList(_for_rows(processor, rows) for processor in self._processors)
        scores = processors(input_ids, logits.to(copy=True, dtype=torch.float32, device=device))
        if self._noise is not None:
            probabilities = scores.softmax(-1)
            if not bool(probabilities.sum().isfinite()):  # stock's words, from torch.multinomial
                raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
            tokens = (probabilities / self._noise.at(step)[rows]).argmax(-1)
        else:
            tokens = scores.argmax(-1)
        ends = self._criteria(torch.cat([input_ids, tokens[:, None]], dim=-1), None)
        return tokens.tolist(), ends.tolist()


def _for_rows(processor: LogitsProcessor, rows: torch.Tensor) -> LogitsProcessor:
    """A processor that may have been given something for each row of the batch, for some of its rows."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(ignored, torch.Tensor):
        return processor
    narrowed = copy.copy(processor)
    narrowed.prompt_ignore_length = ignored.to(rows.device)[rows]
    return narrowed
