"""A mapping that nothing can change, and that pickles."""

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from artaug._internal.mappings import FrozenDict


@given(items=st.dictionaries(st.text(), st.integers()))
def test_it_is_the_mapping_it_was_made_of_also_after_copies(items):
    frozen = FrozenDict(items)
    for again in (frozen, copy.copy(frozen), copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert again == items
        assert list(again.items()) == list(items.items())


def test_it_cannot_be_changed_and_does_not_follow_the_original():
    original = {"a": 1}
    frozen = FrozenDict(original)
    original["b"] = 2
    with pytest.raises(TypeError):
        frozen["a"] = 3
    with pytest.raises(TypeError):
        del frozen["a"]
    assert frozen == {"a": 1}
