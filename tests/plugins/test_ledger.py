"""The ledger: whatever was changed is what it was after undo, without a trace."""

from __future__ import annotations

import random

import pytest
from torch import nn

from hf_paged.ledger import Ledger


class Thing:
    kind = "class attribute"

    def __init__(self):
        self.size = 1

    def method(self):
        return "method"

    @staticmethod
    def static():
        return "static"

    @classmethod
    def of_class(cls):
        return cls


class Derived(Thing):
    pass


class Slots:
    __slots__ = ("size",)


class Computed:
    """Keeps `size` elsewhere, as Transformers' configs keep `_attn_implementation`."""

    def __init__(self):
        self._kept = 1

    @property
    def size(self):
        return self._kept

    @size.setter
    def size(self, value):
        self._kept = value

    @property
    def fixed(self):
        return 1


@pytest.fixture
def ledger():
    return Ledger()


# ------------------------------------------------------------------------------------------------------- set_attribute


def test_an_attribute_that_was_there(ledger):
    thing = Thing()
    ledger.set_attribute(thing, "size", 2)
    assert thing.size == 2
    ledger.undo()
    assert vars(thing) == {"size": 1}


def test_an_attribute_that_was_not_there(ledger):
    thing = Thing()
    ledger.set_attribute(thing, "colour", "red")
    assert thing.colour == "red"
    ledger.undo()
    assert vars(thing) == {"size": 1}


@pytest.mark.parametrize("name", ["method", "kind", "static"])
def test_what_the_class_has_is_shadowed_and_not_copied(ledger, name):
    thing, before = Thing(), getattr(Thing(), name)
    ledger.set_attribute(thing, name, "mine")
    assert getattr(thing, name) == "mine"
    assert Thing().kind == "class attribute"
    ledger.undo()
    assert vars(thing) == {"size": 1}
    if name == "kind":
        assert thing.kind == before


def test_none_is_a_value(ledger):
    thing = Thing()
    thing.size = None
    ledger.set_attribute(thing, "size", 2)
    ledger.undo()
    assert vars(thing) == {"size": None}


def test_an_owners_none_is_not_taken_for_a_value_that_is_gone(ledger):
    thing = Thing()
    ledger.set_attribute(thing, "colour", Thing())  # nothing else holds it
    thing.colour = None
    ledger.undo()
    assert vars(thing) == {"size": 1, "colour": None}


@pytest.mark.parametrize("name", ["method", "static", "of_class", "kind", "brand_new"])
def test_an_attribute_of_a_class(ledger, name):
    before = dict(vars(Thing))
    ledger.set_attribute(Thing, name, lambda self: "mine")
    assert Thing().__getattribute__(name)() == "mine"
    ledger.undo()
    assert dict(vars(Thing)) == before  # a static method is one again, not a function


def test_an_inherited_attribute_of_a_class(ledger):
    before, of_base = dict(vars(Derived)), dict(vars(Thing))
    ledger.set_attribute(Derived, "method", lambda self: "mine")
    assert (Derived().method(), Thing().method()) == ("mine", "method")
    ledger.undo()
    assert dict(vars(Derived)) == before
    assert dict(vars(Thing)) == of_base
    assert Derived().method() == "method"


def test_slots(ledger):
    thing = Slots()
    ledger.set_attribute(thing, "size", 1)
    ledger.set_attribute(thing, "size", 2)
    assert thing.size == 2
    ledger.undo()
    assert not hasattr(thing, "size")


def test_a_property_is_set_through_its_setter(ledger):
    thing = Computed()
    ledger.set_attribute(thing, "size", 5)
    assert thing.size == 5
    assert vars(thing) == {"_kept": 5}
    ledger.undo()
    assert vars(thing) == {"_kept": 1}


def test_what_can_not_be_set_raises_and_leaves_no_entry(ledger):
    with pytest.raises(AttributeError):
        ledger.set_attribute(Computed(), "fixed", 2)
    with pytest.raises(AttributeError):
        ledger.set_attribute(Slots(), "colour", 2)
    assert ledger.entries == ()


def test_parts_of_a_module(ledger):
    """They are replaced where the module keeps them: whoever walks the module sees the new ones, in the same order."""
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    first, weight, mean = module[0], module[2].weight, module[1].running_mean
    before = {name: dict(vars(part)) for name, part in module.named_modules()}
    names = [name for name, _ in module.named_modules()]
    ledger.set_attribute(module, "0", nn.Identity())
    ledger.set_attribute(module[2], "weight", nn.Parameter(weight.detach() + 1))
    ledger.set_attribute(module[1], "running_mean", mean + 1)
    ledger.set_attribute(module[1], "forward", lambda x: x)
    assert [name for name, _ in module.named_modules()] == names
    assert isinstance(module[0], nn.Identity)
    assert module.state_dict()["2.weight"].equal(weight + 1)
    assert module.state_dict()["1.running_mean"].equal(mean + 1)
    ledger.undo()
    assert module[0] is first
    assert module[2].weight is weight
    assert module[1].running_mean is mean
    assert {name: dict(vars(part)) for name, part in module.named_modules()} == before


# ------------------------------------------------------------------------------------------------------------ set_item


def test_an_item_that_was_there_and_one_that_was_not(ledger):
    mapping = {"a": 1, "none": None, "z": 3}
    for key in ("a", "b", "none"):
        ledger.set_item(mapping, key, 2)
    assert mapping == {"a": 2, "none": 2, "z": 3, "b": 2}
    ledger.undo()
    assert list(mapping.items()) == [("a", 1), ("none", None), ("z", 3)]


def test_an_item_that_somebody_removed_meanwhile(ledger):
    mapping = {}
    ledger.set_item(mapping, "a", 1)
    del mapping["a"]
    ledger.undo()
    assert mapping == {}


# ------------------------------------------------------------------------------------------------------------ the books


def test_changes_are_undone_in_reverse(ledger):
    order = []
    for number in range(4):
        ledger.record(str(number), lambda number=number: order.append(number))
    ledger.undo()
    assert order == [3, 2, 1, 0]


def test_a_thing_changed_twice_is_what_it_was_at_first(ledger):
    thing = Thing()
    for size in (2, 3, 4):
        ledger.set_attribute(thing, "size", size)
    ledger.undo()
    assert vars(thing) == {"size": 1}


def test_entries_tell_what_was_changed(ledger):
    ledger.set_attribute(Thing(), "size", 2)
    ledger.set_attribute(Thing, "kind", 2)
    ledger.set_item({}, "key", 2)
    ledger.record("something else", lambda: None)
    assert ledger.entries == ("Thing.size", "Thing.kind", "dict['key']", "something else")
    ledger.undo()
    assert ledger.entries == ()


def test_undoing_twice_does_nothing_more(ledger):
    thing, calls = Thing(), []
    ledger.record("a call", lambda: calls.append(1))
    ledger.set_attribute(thing, "size", 2)
    ledger.undo()
    thing.size = 7  # the user's own
    ledger.undo()
    assert thing.size == 7
    assert calls == [1]


def test_a_ledger_is_used_again_after_undo(ledger):
    thing = Thing()
    for _ in range(2):
        ledger.set_attribute(thing, "size", 2)
        ledger.undo()
        assert vars(thing) == {"size": 1}


def test_an_exception_in_the_middle_keeps_nothing_from_being_undone(ledger):
    thing = Thing()

    def fail():
        raise ZeroDivisionError("first to be undone")

    def fail_too():
        raise OSError("second")

    ledger.set_attribute(thing, "size", 2)
    ledger.record("it fails too", fail_too)
    ledger.set_attribute(thing, "colour", "red")
    ledger.record("it fails", fail)
    with pytest.raises(ZeroDivisionError, match="first to be undone"):
        ledger.undo()
    assert vars(thing) == {"size": 1}
    assert ledger.entries == ()
    ledger.undo()


def test_an_interrupt_in_the_middle_is_gone_on_from(ledger):
    thing, interrupted = Thing(), []

    def interrupt():
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt

    ledger.set_attribute(thing, "size", 2)
    ledger.record("interrupted", interrupt)
    ledger.set_attribute(thing, "colour", "red")
    with pytest.raises(KeyboardInterrupt):
        ledger.undo()
    assert ledger.entries == ("Thing.size", "interrupted")
    ledger.undo()
    assert vars(thing) == {"size": 1}


def test_changes_broken_off_by_an_exception_are_undone(ledger):
    thing, mapping = Thing(), {"a": 1}
    before = dict(vars(Thing))

    def change():
        ledger.set_attribute(thing, "size", 2)
        ledger.set_attribute(Thing, "method", None)
        ledger.set_item(mapping, "a", 2)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change()
    ledger.undo()
    assert (vars(thing), dict(vars(Thing)), mapping) == ({"size": 1}, before, {"a": 1})


def test_any_changes_leave_no_trace(ledger):
    draw = random.Random(0)
    things, mapping = [Thing() for _ in range(3)], {"a": 1}
    before = [dict(vars(thing)) for thing in things], dict(vars(Thing)), dict(mapping)
    for number in range(300):
        name = draw.choice(["size", "colour", "method", "kind"])
        target = draw.choice([*things, Thing, mapping])
        if target is mapping:
            ledger.set_item(mapping, name, number)
        else:
            ledger.set_attribute(target, name, number)
    ledger.undo()
    assert ([dict(vars(thing)) for thing in things], dict(vars(Thing)), dict(mapping)) == before
