"""The engine's sampler: logits -> token ids, each request by its own SamplingParams."""

from __future__ import annotations

import functools
import hashlib
import itertools
import secrets
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from hf_paged.engine.staging import Staging
from hf_paged.params import SamplingParams
from hf_paged.protocols import SamplingKernels
from hf_paged.request import Request, Sampled

NO_TOKEN = -1  # of a request for which no token may be drawn


class BatchSampler:
    """Serves requests with any mix of parameters in one pass.

    A request with a seed draws from noise keyed by (seed, output position), so that its tokens don't depend on the
    batch it lands in. With kernels the others have such a seed too, given by the sampler; without they share a
    generator.

    Args:
        seed: of the draws of requests without a seed of their own; None: from the operating system.
        kernels: what chooses on the device; None: torch.
    """

    def __init__(self, seed: int | None = None, kernels: SamplingKernels | None = None) -> None:
        self._seed = seed
        self._kernels = kernels
        self._salt = secrets.token_bytes(8) if seed is None else str(seed).encode()
        self._generators: dict[torch.device, torch.Generator] = {}
        self._staging: dict[torch.device, Staging] = {}

    def sample(self, requests: Sequence[Request], logits: torch.Tensor) -> Sampled:
        return Sampled(self.launch(requests, logits).tolist())

    def launch(self, requests: Sequence[Request], logits: torch.Tensor) -> torch.Tensor:
        """The tokens of the requests, int64 [rows], on the device: nothing is waited for.

        A request whose constraints leave no token gets NO_TOKEN.

        Args:
            logits: [rows, vocabulary]; left as they are.
        """
        if any(_may_forbid_all(request) for request in requests):
            return self._chosen(requests, logits)
        return self._choose(requests, logits)[0]

    def _chosen(self, requests: Sequence[Request], logits: torch.Tensor) -> torch.Tensor:
        """The tokens, with NO_TOKEN where a request's own constraints leave none."""
        tokens, rated = self._choose(requests, logits)
        limited = torch.tensor([_may_forbid_all(request) for request in requests], device=tokens.device)
        return tokens.masked_fill(limited & (rated.amax(-1) == -torch.inf), NO_TOKEN)

    def _choose(self, requests: Sequence[Request], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens, and the logits that they were chosen from."""
        if all(_is_plain(request) for request in requests):
            return self._argmax(logits), logits
        logits = logits.float().clone()
        for row, request in zip(logits, requests, strict=True):
            _constrain(row, request)
        _penalize(logits, requests)
        if all(request.params.greedy for request in requests):
            return self._argmax(logits), logits
        return (self._draw_on_device if self._kernels else self._draw)(requests, logits), logits

    def rehearse(self, logits: torch.Tensor, sizes: Iterable[int]) -> None:
        """Sample at each batch size in `sizes`, so that no kernel is compiled later; logits [rows, vocabulary]."""
        if self._kernels is None:
            return
        wide = logits.float()  # what is changed before it is chosen from
        ones = torch.ones(len(logits), dtype=torch.int64, device=logits.device)
        drawn = functools.partial(self._kernels.sample, temperature=ones.float(), seeds=ones, positions=ones)
        for top_k, top_p, min_p in itertools.product((None, ones.int()), (None, ones.float()), (None, ones.float())):
            drawn(wide, top_k=top_k, top_p=top_p, min_p=min_p)
        for size in sizes:
            number = ones[:size]
            drawn = functools.partial(self._kernels.sample, temperature=number.float(), seeds=number, positions=number)
            drawn(wide[:size], top_k=None, top_p=None, min_p=None)
            self._kernels.argmax(logits[:size])
            self._kernels.argmax(wide[:size])

    def _argmax(self, logits: torch.Tensor) -> torch.Tensor:
        return self._kernels.argmax(logits) if self._kernels else logits.argmax(-1)

    def _draw(self, requests: Sequence[Request], logits: torch.Tensor) -> torch.Tensor:
        tokens = logits.argmax(-1)
        drawn = [i for i, request in enumerate(requests) if not request.params.greedy]
        chosen = [requests[i] for i in drawn]
        probabilities = filtered(logits[drawn], [r.params for r in chosen]).softmax(-1)
        # argmax(p / e) with e ~ Exp(1) draws from p, and needs no host value (the exponential race).
        tokens[drawn] = (probabilities / self._noise(chosen, probabilities)).argmax(-1)
        return tokens

    def _draw_on_device(self, requests: Sequence[Request], logits: torch.Tensor) -> torch.Tensor:
        assert self._kernels is not None
        params = [request.params for request in requests]
        staging = self._staging.setdefault(logits.device, Staging(logits.device))
        temperature, top_p, min_p, top_k, seeds, positions = staging.send([
            np.array([0.0 if p.greedy else p.temperature for p in params], np.float32),
            np.array([p.top_p for p in params], np.float32),
            np.array([p.min_p for p in params], np.float32),
            np.array([min(max(p.top_k, 0), logits.shape[-1]) for p in params], np.int32),
            np.array([self._seed_of(request) for request in requests], np.int64),
            np.array([_position(request) for request in requests], np.int64),
        ])  # fmt: skip
        drawn = [p for p in params if not p.greedy]
        return self._kernels.sample(
            logits,
            temperature=temperature,
            seeds=seeds,
            positions=positions,
            top_k=top_k if any(p.top_k > 0 for p in drawn) else None,
            top_p=top_p if any(p.top_p < 1 for p in drawn) else None,
            min_p=min_p if any(p.min_p > 0 for p in drawn) else None,
        )

    def _seed_of(self, request: Request) -> int:
        seed = request.params.seed
        if seed is None:
            key = self._salt + request.order.to_bytes(8, "little", signed=True)
            return int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little")
        return seed & (2**63 - 1)

    def _noise(self, requests: Sequence[Request], like: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(like).exponential_(generator=self._generator(like.device))
        for row, request in zip(noise, requests, strict=True):
            if request.params.seed is not None:
                row.exponential_(generator=_keyed(request.params.seed, _position(request), like.device))
        return noise

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            generator = torch.Generator(device)
            generator.seed() if self._seed is None else generator.manual_seed(self._seed % 2**64)  # what torch takes
            self._generators[device] = generator
        return self._generators[device]


def needs_history(request: Request) -> bool:
    """Whether choosing its next token takes the tokens before it: it waits until the host knows them."""
    p = request.params
    return bool(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1.0 or request.banned)


def _may_forbid_all(request: Request) -> bool:
    """Whether something forbids tokens of its choice, so that none may be left."""
    p = request.params
    limited = p.allowed_token_ids is not None or _position(request) < p.min_tokens
    return bool(limited or request.banned or request.constraint is not None)


def _position(request: Request) -> int:
    """Which output token is chosen, counted from 0."""
    return request.num_tokens - len(request.prompt_token_ids)


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
    changed = p.logit_bias or p.allowed_token_ids or needs_history(request) or _position(request) < p.min_tokens
    return p.greedy and not changed


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
    if _position(request) < params.min_tokens:
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
