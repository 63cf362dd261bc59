"""The engine's sampler: logits -> token ids, each request by its own SamplingParams."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

from hf_paged.params import SamplingParams
from hf_paged.types import Request, Sampled


class BatchSampler:
    """Serves requests with any mix of parameters in one pass.

    A request with a seed draws from noise keyed by (seed, output position), so that its tokens don't depend on the
    batch it lands in; the others share one generator.

    Args:
        seed: of the generator for requests without a seed of their own; None: from the operating system.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def sample(self, requests: Sequence[Request], logits: torch.Tensor) -> Sampled:
        """See `TokenSampler.sample`."""
        if all(_is_plain(request) for request in requests):
            return Sampled(logits.argmax(-1).tolist())
        logits = logits.float().clone()
        for row, request in zip(logits, requests, strict=True):
            _constrain(row, request)
        _penalize(logits, requests)
        tokens = logits.argmax(-1)
        drawn = [i for i, request in enumerate(requests) if not request.params.greedy]
        if drawn:
            chosen = [requests[i] for i in drawn]
            probabilities = filtered(logits[drawn], [r.params for r in chosen]).softmax(-1)
            # argmax(p / e) with e ~ Exp(1) draws from p, and needs no host value (the exponential race).
            tokens[drawn] = (probabilities / self._noise(chosen, probabilities)).argmax(-1)
        return Sampled(tokens.tolist())

    def _noise(self, requests: Sequence[Request], like: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(like).exponential_(generator=self._generator(like.device))
        for row, request in zip(noise, requests, strict=True):
            if request.params.seed is not None:
                row.exponential_(generator=_keyed(request.params.seed, request.num_output, like.device))
        return noise

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            generator = torch.Generator(device)
            generator.seed() if self._seed is None else generator.manual_seed(self._seed)
            self._generators[device] = generator
        return self._generators[device]


def filtered(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Temperature, min-p, top-k and top-p, in that order, each row by its own.

    Args:
        logits: float32 [rows, vocabulary].

    Returns:
        The logits of the same shape, with -inf where a token is dropped.
    """

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    logits = logits / column([p.temperature for p in params])
    if any(p.min_p > 0 for p in params):
        probabilities = logits.softmax(-1)
        floor = column([p.min_p for p in params]) * probabilities.amax(-1, keepdim=True)
        logits = logits.masked_fill(probabilities < floor, -torch.inf)
    if all(p.top_k <= 0 and p.top_p >= 1 for p in params):
        return logits
    # Rounding makes the sum of the likely tokens reach 1 before the last one: a row without top-p has no bound at all.
    most = column([p.top_p if p.top_p < 1 else torch.inf for p in params])
    ordered, order = logits.sort(-1, descending=True)
    vocabulary = logits.shape[-1]
    ranks = torch.arange(vocabulary, device=logits.device)[None]
    dropped = ranks >= column([p.top_k if 0 < p.top_k < vocabulary else vocabulary for p in params])
    ordered = ordered.masked_fill(dropped, -torch.inf)
    mass = ordered.softmax(-1)
    before = mass.cumsum(-1) - mass  # of the more likely ones; the first has none
    ordered = ordered.masked_fill((before >= most) & (ranks > 0), -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def _is_plain(request: Request) -> bool:
    """Greedy, with nothing that changes a logit."""
    p = request.params
    changed = p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0 or p.logit_bias
    return p.greedy and not (changed or p.allowed_token_ids or request.banned or request.num_output < p.min_tokens)


def _constrain(row: torch.Tensor, request: Request) -> None:
    """What must not, must or should rather be drawn, in place on one row of logits."""
    params = request.params
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=row.device)
        row[ids] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype, device=row.device)
    if params.allowed_token_ids is not None:
        allowed = torch.tensor(list(params.allowed_token_ids), device=row.device)
        kept = row[allowed]
        row.fill_(-torch.inf)[allowed] = kept
    if request.num_output < params.min_tokens:
        ends = {*request.eos_token_ids, *(params.stop_token_ids or ())}
        row[[token for token in ends if 0 <= token < len(row)]] = -torch.inf  # configs name ids that models don't have
    for *before, last in request.banned:
        start = len(request.token_ids) - len(before)
        if start >= len(request.prompt_token_ids) and request.token_ids[start:] == before:
            row[last] = -torch.inf


def _penalize(logits: torch.Tensor, requests: Sequence[Request]) -> None:
    """Repetition, presence and frequency penalties, in place (Keskar et al. 2019, arXiv:1909.05858, for the first)."""
    for row, request in zip(logits, requests, strict=True):
        params = request.params
        if params.repetition_penalty != 1.0:
            seen = torch.tensor(request.token_ids, device=row.device).unique()
            score = row[seen]
            row[seen] = torch.where(score > 0, score / params.repetition_penalty, score * params.repetition_penalty)
        if (params.presence_penalty or params.frequency_penalty) and request.num_output:
            ids, counts = torch.tensor(request.output_token_ids, device=row.device).unique(return_counts=True)
            row[ids] -= params.frequency_penalty * counts + params.presence_penalty


def _keyed(seed: int, position: int, device: torch.device) -> torch.Generator:
    key = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=7).digest()  # 56 bits: what every generator takes
    return torch.Generator(device).manual_seed(int.from_bytes(key, "little"))
