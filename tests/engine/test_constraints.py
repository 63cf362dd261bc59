"""What the engine does with a request's constraint, and which batches a processor is given."""

from __future__ import annotations

import pytest
from engine.fake import assert_empty, expected, finish, make_engine, make_request

from hf_paged.errors import InvalidRequestError

WANTED = {"structured_outputs": {"json_object": True}}


class After:
    """Complete after so many tokens; raises at the token `fails`. Keeps the lengths at which it was asked."""

    def __init__(self, count=99, fails=None):
        self.count, self.fails = count, fails
        self.seen = []

    def advance(self, request):
        self.seen.append(request.num_output)
        if request.num_output == self.fails:
            raise ZeroDivisionError("not allowed")
        return request.num_output >= self.count


class Spy:
    """A processor that concerns some requests, and changes nothing."""

    def __init__(self, concerns):
        self.batches = []
        if concerns is not None:
            self.concerns = concerns

    def process(self, requests, logits):
        self.batches.append(set(requests))
        return logits


def constrained(constraint, prompt=(1, 2, 3), max_tokens=8, **params):
    return make_request(list(prompt), max_tokens, params={**WANTED, **params}, constraint=constraint)


def test_a_complete_output_ends():
    constraint = After(3)
    request = constrained(constraint)
    engine = make_engine()
    assert finish(engine, request) == [expected([1, 2, 3], 3)]
    assert (request.finish_reason, request.stop_reason) == ("stop", None)
    assert constraint.seen == [1, 2, 3]
    assert_empty(engine)


def test_a_complete_output_is_not_cut_off():
    complete, cut = constrained(After(4), max_tokens=4), constrained(After(5), max_tokens=4)
    finish(make_engine(), complete, cut)
    assert (complete.finish_reason, cut.finish_reason) == ("stop", "length")


def test_a_complete_output_ends_before_min_tokens():
    request = constrained(After(2), min_tokens=5)
    finish(make_engine(), request)
    assert (request.num_output, request.finish_reason) == (2, "stop")


def test_a_stop_string_goes_before_completeness():
    request = constrained(After(3))
    request.stop_check = lambda request: "found" if request.num_output == 3 else None
    finish(make_engine(), request)
    assert (request.finish_reason, request.stop_reason) == ("stop", "found")


def test_a_constraint_that_raises_ends_its_request_alone():
    bad, good = constrained(After(fails=2)), make_request([4, 5], 6)
    engine = make_engine()
    assert finish(engine, bad, good)[1] == expected([4, 5], 6)
    assert bad.finish_reason == "error"
    assert isinstance(bad.error, ZeroDivisionError)
    assert_empty(engine)


def test_structured_outputs_without_a_constraint_are_refused():
    with pytest.raises(InvalidRequestError, match="no plugin was asked to keep it"):
        make_engine().add(make_request([1], params=WANTED))


def test_a_processor_is_given_the_batches_that_concern_it():
    mine, other = constrained(After()), make_request([4, 5], 12)
    some, every = Spy(lambda request: request is mine), Spy(None)
    finish(make_engine(engine={"processors": [some, every]}), mine, other)
    assert len(some.batches) == 8  # until it ended
    assert all(mine in batch for batch in some.batches)
    assert {other} in every.batches
    assert len(every.batches) == 12
