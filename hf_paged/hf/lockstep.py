"""Stock's own decoding loop, with the engine in the place of the forward.

For calls whose processors, criteria or streamer may look at the whole batch: all rows take each step together, in the
caller's thread and with its random numbers, and rows that ended run on with padding until the last one ends, as stock
has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_paged.engine.call import raise_errors
from hf_paged.engine.staging import recorded
from hf_paged.engine.thread import EngineThread
from hf_paged.hf.prepare import Prepared
from hf_paged.request import Request, Sampled


class Handoff:
    """A sampler that hands each row's logits to the caller, and lets the row await its token.

    Args:
        device: where the logits are.
    """

    def __init__(self, device: torch.device) -> None:
        self.logits: dict[Request, torch.Tensor] = {}
        # The caller reads them on its own stream: wait for them there, unless the owner thread launches on it too.
        self._waits = recorded(device) is not None

    def sample(self, requests: Sequence[Request], logits: torch.Tensor) -> Sampled:
        if self._waits:
            torch.cuda.current_stream(logits.device).synchronize()
        self.logits.update(zip(requests, logits, strict=True))
        return Sampled([None] * len(requests))


def run(
    call: Prepared, thread: EngineThread, requests: Sequence[Request], handoff: Handoff
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None, tuple[torch.Tensor, ...] | None]:
    """Carry a call to its end, step by step.

    Returns:
        The sequences [rows, width + steps]; the processed scores and the raw logits of each step, where asked for.
    """
    config, input_ids = call.config, call.input_ids
    scores: tuple[torch.Tensor, ...] | None = () if config.return_dict_in_generate and config.output_scores else None
    logits: tuple[torch.Tensor, ...] | None = () if config.return_dict_in_generate and config.output_logits else None
    pads = any(hasattr(criterion, "eos_token_id") for criterion in call.criteria)
    pad = config._pad_token_tensor.to(input_ids.device) if config._pad_token_tensor is not None else None
    unfinished = torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
    done = False
    with thread.call(requests) as stay:
        while True:
            stay.wait(lambda: all(r.held or r.finished for r in requests) or any(r.error for r in requests))
            if done:
                return input_ids, scores, logits
            raise_errors(requests)
            if call.streamer is not None and not call.seen:
                call.streamer.put(input_ids.cpu())  # no sooner: of a call that is begun again it would come twice
            call.seen = True
            raw = torch.stack([handoff.logits[request] for request in requests])
            raw = raw.to(copy=True, dtype=torch.float32, device=input_ids.device)
            processed = call.processors(input_ids, raw)
            scores = (*scores, processed) if scores is not None else None
            logits = (*logits, raw) if logits is not None else None
            tokens = _choose(processed, bool(config.do_sample))
            if pads and pad is not None:
                tokens = tokens * unfinished + pad * (1 - unfinished)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            unfinished = unfinished & ~call.criteria(input_ids, scores)
            if call.streamer is not None:
                call.streamer.put(tokens.cpu())
            # In one copy: the device is idle until the next step is launched.
            chosen, going_on = torch.stack([tokens, unfinished.long()]).tolist()
            done = not any(going_on)
            stay.push([(request, token, done) for request, token in zip(requests, chosen, strict=True)])


def _choose(scores: torch.Tensor, sample: bool) -> torch.Tensor:
    if sample:
        return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
    return scores.argmax(-1)
