"""The random numbers of one `generate()` call: the ones that stock `generate()` would have drawn."""

from __future__ import annotations

import threading
import weakref

import torch

from hf_paged.forks import after_fork, renewed_after_fork

_lock = renewed_after_fork(threading.Lock())
# Held weakly: one that an interrupt kept from being closed goes with its call.
_in_flight: weakref.WeakSet[CallNoise] = weakref.WeakSet()
after_fork(_in_flight.clear)


class CallNoise:
    """Exponential noise for each step and row of a call, from the global generator's state at its start.

    `torch.multinomial` draws one token a row by the exponential race: argmax(p / e), e ~ Exp(1), over the whole batch.
    Rows of a continuous batch reach a step at different times, so the generator's state is noted for each step, and a
    step's noise is made again when a late row needs it. At the end the global generator is where stock would have left
    it. Of calls that overlap in time, only the first takes the global state; the others draw a seed from it, so that
    two threads don't get the same numbers.

    Args:
        rows: rows of the call, finished ones counted.
        vocabulary: size of a row.
        device: where the noise is drawn.
    """

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        self._shape = (rows, vocabulary)
        self._device = device
        self._generator = torch.Generator(device)
        with _lock:
            self._alone = not any(other._device == device for other in _in_flight)
            _in_flight.add(self)
            default = _default_generator(device)
            if self._alone:
                self._generator.set_state(default.get_state())
            else:
                seed = torch.randint(2**62, (), dtype=torch.int64, device=device, generator=default)
                self._generator.manual_seed(int(seed))
            self._start = default.get_state()
        self._states = [self._generator.get_state()]
        self._last: tuple[int, torch.Tensor] | None = None

    def at(self, step: int) -> torch.Tensor:
        """The noise of a step: float32 [rows, vocabulary]."""
        if self._last is None or self._last[0] != step:
            for missing in range(min(step, len(self._states) - 1), step + 1):
                self._generator.set_state(self._states[missing])
                noise = torch.empty(self._shape, device=self._device).exponential_(generator=self._generator)
                if missing + 1 == len(self._states):
                    self._states.append(self._generator.get_state())
                self._last = missing, noise
        assert self._last is not None
        return self._last[1]

    def close(self, *, drawn: bool = True) -> None:
        """Leave the global generator where the draws so far would have left it.

        Args:
            drawn: False if the call will be run again and draw the same numbers.
        """
        with _lock:
            _in_flight.discard(self)
            default = _default_generator(self._device)
            untouched = torch.equal(default.get_state(), self._start)
            if drawn and self._alone and untouched:
                default.set_state(self._states[-1])


def _default_generator(device: torch.device) -> torch.Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index if device.index is not None else torch.cuda.current_device()]
    return torch.default_generator
