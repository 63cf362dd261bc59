"""Proof before use: the paged model and the stock one have to agree on a few random tokens.

Families differ in more ways than a list can hold (keywords dropped, masks of their own, state between tokens), so a
model is carried only after it was seen to work: chunked prefill mixed with decode, against a plain forward a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from hf_paged.config import PagedConfig
from hf_paged.engine.engine import Engine
from hf_paged.errors import UnsupportedModelError, first_line
from hf_paged.hf.model import FlatModel
from hf_paged.hf.params import special_ids
from hf_paged.params import SamplingParams
from hf_paged.protocols import AttentionBackend
from hf_paged.request import Request, Sampled

# Relative error, ‖paged − stock‖ / ‖stock‖ of a row of logits. A wrong mask or position gives far more; experts that
# flip on a rounding, in half precision, less than the second.
TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-6}
HALF_TOLERANCE = 0.1
ROWS = (5, 11)  # prompt lengths; a chunk of 4 splits both
LONGEST_WINDOW = 64  # shorter windows are passed by the longer row, so that they are seen to slide
LONGEST_BLOCK = 64  # shorter blocks likewise, so that a row is seen to have several
NEW = 3
TRIAL_ROW = 8
LENGTHS = (2, 9, 20, 40, 70)  # of prompts: products of so many rows have tiles of their own on some GPU
LENGTHS_ON_CPU = LENGTHS[:3]  # where there is one tile, and rows take long


def verify(model: PreTrainedModel, flat: FlatModel, backend: AttentionBackend, block_size: int) -> None:
    """Compare a few tokens' logits.

    Args:
        model, flat: the two to compare.
        backend: the attention under `flat`.
        block_size: the engine's, for a backend may take few sizes, and have kernels for each.

    Raises:
        UnsupportedModelError: the paged model fails, or gives other logits than the stock one.
    """
    windows = [window for window in flat.spec.windows if window is not None and window <= LONGEST_WINDOW]
    past_a_block = block_size + 4 if block_size <= LONGEST_BLOCK else 0
    lengths = (ROWS[0], max([ROWS[1], past_a_block, *(window + 4 for window in windows)]))
    rows = _prompts(model, flat.vocab_size, _that_fit(flat, lengths))
    with _trial(), flat.uncompiled():
        seen, tokens = _paged(flat, backend, rows, block_size)
        expected = [_stock(model, row) for row in tokens]
    for prompt, got, want in zip(rows, seen, expected, strict=True):
        wanted = want[len(prompt) - 1 : len(prompt) - 1 + len(got)]
        error = float(((torch.stack(got).float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())
        limit = TOLERANCE.get(flat.spec.dtype, HALF_TOLERANCE)
        if not error <= limit:  # NaN is no agreement either
            raise UnsupportedModelError(
                "its logits on a flat batch are not those of its rows alone "
                f"(relative error {error:.1e}, limit {limit:.0e})"
            )


def try_fusion(model: PreTrainedModel, flat: FlatModel, backend: AttentionBackend, block_size: int) -> None:
    """Have each fused layer of `flat` compared with its own forward, in two chunks of a prompt and a decode step.

    Raises:
        whatever a kernel raises.
    """
    _paged(flat, backend, _prompts(model, flat.vocab_size, _that_fit(flat, (TRIAL_ROW,))), block_size)


def verify_invariance(model: PreTrainedModel, flat: FlatModel, backend: AttentionBackend, block_size: int) -> None:
    """Compare rows' logits computed alone and at once with those computed together and in pieces, bit by bit.

    Raises:
        UnsupportedModelError: they differ, or the model fails.
    """
    lengths = LENGTHS_ON_CPU if flat.spec.device.type == "cpu" else LENGTHS
    rows = _prompts(model, flat.vocab_size, _that_fit(flat, lengths))
    with _trial():
        together, _ = _paged(flat, backend, rows, block_size)
        apart = [_paged(flat, backend, [row], block_size, most=len(row))[0][0] for row in rows]
    for alone, logits in zip(apart, together, strict=True):
        if not all(map(torch.equal, alone, logits)):
            raise UnsupportedModelError(
                "deterministic=True: a row's logits alone and in a batch differ in some bit; a kernel adds up in an "
                "order that depends on the batch"
            )


@contextmanager
def _trial() -> Iterator[None]:
    """What is raised within is that the model can't be carried."""
    try:
        yield
    except UnsupportedModelError:
        raise
    except Exception as raised:
        raise UnsupportedModelError(
            f"a trial on the paged engine fails: {type(raised).__name__}: {first_line(raised)}"
        ) from raised


class _Recorder:
    """A greedy sampler that keeps the logits."""

    def __init__(self) -> None:
        self.logits: dict[str, list[torch.Tensor]] = {}

    def sample(self, requests: Sequence[Request], logits: torch.Tensor) -> Sampled:
        for request, row in zip(requests, logits, strict=True):
            self.logits.setdefault(request.request_id, []).append(row.clone())
        return Sampled(logits.argmax(-1).tolist())


def _that_fit(flat: FlatModel, lengths: Sequence[int]) -> list[int]:
    """Lengths of prompts, shortened to what the model has positions for."""
    most = flat.max_positions - NEW if flat.max_positions is not None else max(lengths)
    return [max(1, min(length, most)) for length in lengths]


def _prompts(model: PreTrainedModel, vocabulary: int, lengths: Sequence[int]) -> list[list[int]]:
    """Random ids without those that a config gives a meaning."""
    special = special_ids(model)
    generator = torch.Generator().manual_seed(0)
    ids = [
        i
        for i in torch.randint(0, vocabulary, (4 * sum(lengths) + 64,), generator=generator).tolist()
        if i not in special
    ]
    return [ids[sum(lengths[:i]) : sum(lengths[: i + 1])] for i in range(len(lengths))]


def _paged(
    flat: FlatModel, backend: AttentionBackend, rows: Sequence[list[int]], block_size: int, most: int | None = None
) -> tuple[list[list[torch.Tensor]], list[list[int]]]:
    """The logits that chose each new token, and the rows with those tokens, in steps of `most` tokens, or a few."""
    blocks = sum(-(-(len(row) + NEW) // block_size) + 1 for row in rows)
    config = PagedConfig(
        block_size=block_size,
        num_blocks=blocks,
        max_num_batched_tokens=most or 4 + len(rows),
        enable_prefix_caching=False,
        enforce_eager=True,
    )
    engine, recorder = Engine(flat, backend, config), _Recorder()
    params = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
    requests = [Request(str(i), list(row), params, sampler=recorder) for i, row in enumerate(rows)]
    engine.run(requests)
    return [recorder.logits[request.request_id] for request in requests], [request.token_ids for request in requests]


def _stock(model: PreTrainedModel, row: list[int]) -> torch.Tensor:
    """The logits of a plain forward over one row: float32 [tokens, vocabulary]."""
    device = model.get_input_embeddings().weight.device
    with torch.no_grad(), _without_cudnn(device):
        output = model(input_ids=torch.tensor([row], device=device), use_cache=False, return_dict=True)
    return output.logits[0].float()


@contextmanager
def _without_cudnn(device: torch.device) -> Iterator[None]:
    """Keep stock's attention off cuDNN's, torch's choice on an H100, which takes a second to set up for a trial."""
    if device.type != "cuda" or not torch.backends.cuda.cudnn_sdp_enabled():
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
