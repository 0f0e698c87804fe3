"""What holds for every value: legal or not made, frozen, the same after JSON."""

import contextlib
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import artaug as aa
from artaug._internal.values import from_json, to_json, value
from support.strategies import values


@given(values)
def test_a_value_survives_json(thing):
    text = to_json(thing)
    assert "\n" not in text
    assert from_json(type(thing), text) == thing
    assert from_json(type(thing), text.encode()) == thing


@given(values)
def test_a_value_is_frozen(thing):
    name = dataclasses.fields(thing)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(thing, name, getattr(thing, name))


@given(st.text())
def test_any_text_is_a_value_or_a_clear_error(text):
    with contextlib.suppress(aa.InvalidValueError):
        assert isinstance(from_json(aa.Critique, text), aa.Critique)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int64, np.bool_, int])
def test_numpy_numbers_become_plain_ones(kind):
    box = aa.Box(kind(0), kind(0), kind(1), kind(1))
    assert {type(edge) for edge in dataclasses.astuple(box)} == {float}
    assert repr(box) == "Box(left=0.0, top=0.0, right=1.0, bottom=1.0)"


def test_numpy_numbers_inside_containers_become_plain_ones():
    verdict = aa.Verdict(np.bool_(True), "why", {"gain": np.float32(0.5)})
    assert repr(verdict) == "Verdict(keep=True, reason='why', scores={'gain': 0.5})"


def test_lists_become_tuples():
    box = aa.Box(0, 0, 1, 1)
    assert aa.Critique([aa.Suggestion(box, "a")]).suggestions == (aa.Suggestion(box, "a"),)


def test_unknown_arguments_are_refused():
    with pytest.raises((aa.InvalidValueError, TypeError), match="down"):
        aa.Box(left=0, top=0, right=1, down=1)


def test_missing_arguments_are_named():
    with pytest.raises((aa.InvalidValueError, TypeError), match="bottom"):
        aa.Box(0, 0, 1)


def test_an_error_names_the_field_and_quotes_what_came():
    with pytest.raises(aa.InvalidValueError) as caught:
        aa.Box(0, 0, 1, "low")
    assert str(caught.value) == "Box(bottom='low'): expected a number, received a str."


def test_a_rule_broken_deep_inside_is_the_rules_own_error():
    text = '{"suggestions": [{"box": {"left": 0, "top": 0, "right": 9, "bottom": 1}, "prompt": "a"}]}'
    with pytest.raises(aa.GeometryError, match="is not relative"):
        from_json(aa.Critique, text)


def test_what_is_quoted_is_cut_short():
    with pytest.raises(aa.InvalidValueError) as caught:
        from_json(aa.Critique, '{"suggestions": "' + "x" * 1000 + '"}')
    assert len(str(caught.value)) < 250


def test_half_a_character_is_no_text():
    with pytest.raises(aa.InvalidValueError, match="Suggestion: prompt"):
        aa.Suggestion(aa.Box(0, 0, 1, 1), "\ud800")


def test_a_class_of_ones_own_can_be_a_value():
    @value
    class Dose:
        millilitres: float

        def __post_init__(self):
            if self.millilitres < 0:
                raise aa.InvalidValueError(f"{self} is less than nothing.")

    assert from_json(Dose, to_json(Dose(np.float32(2)))) == Dose(2)
    with pytest.raises(aa.InvalidValueError, match="less than nothing"):
        Dose(-1)
