"""What ends an output: stop strings in its text, and ids that end it and are no text of it."""

from __future__ import annotations

from collections.abc import Sequence

from hf_paged.params import SamplingParams
from hf_paged.text.detokenizer import Detokenizer
from hf_paged.types import Request


class StopStrings:
    """A request's stop check: looks for its stop strings in the text, and cuts the text there.

    Args:
        detokenizer: of the request.
        params: with the stop strings.
    """

    def __init__(self, detokenizer: Detokenizer, params: SamplingParams) -> None:
        self._detokenizer = detokenizer
        self._stops = tuple(params.stop or ())
        self._keep = params.include_stop_str_in_output

    def __call__(self, request: Request) -> str | None:
        """The stop string that the newest token completes, if one does."""
        # Not called before min_tokens, so stop strings there don't count. A second call adds nothing.
        first = len(request.prompt_token_ids) + self._detokenizer.num_added
        self._detokenizer.add(request.token_ids[first:-1])
        piece = self._detokenizer.add(request.token_ids[max(first, len(request.token_ids) - 1) :])
        text = self._detokenizer.text
        found = find_stop(text, self._stops, len(text) - len(piece))
        if found is None:
            return None
        at, stop = found
        self._detokenizer.text = text[: at + len(stop) * self._keep]
        return stop


def find_stop(text: str, stops: Sequence[str], begins: int) -> tuple[int, str] | None:
    """The first stop string that text from `begins` on completes: where it stands, and which one it is."""
    found = [(at, stop) for stop in stops if (at := text.find(stop, max(0, begins - len(stop) + 1))) >= 0]
    return min(found) if found else None


def silent_ends(params: SamplingParams, eos: frozenset[int]) -> frozenset[int]:
    """Ids that are no text where they end the output: as with stop strings, unless `include_stop_str_in_output`."""
    if params.include_stop_str_in_output:
        return frozenset()
    return frozenset(params.stop_token_ids or ()).union(() if params.ignore_eos else eos)
