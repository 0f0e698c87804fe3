"""Different rows of a matrix, as torch finds them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from artaug._internal import unique_rows as module
from artaug._internal.unique_rows import unique_rows

numbers = st.sampled_from([0.0, 0.25, 1.0, 3.5])


@given(
    rows=st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=30),
    dtype=st.sampled_from(["float32", "bool"]),
)
def test_rows_are_those_of_torch(rows, dtype):
    matrix = torch.tensor(rows).to(getattr(torch, dtype))
    expected = torch.unique(matrix, dim=0, return_inverse=True)
    assert all(map(torch.equal, unique_rows(matrix), expected))


@pytest.mark.parametrize("direction", [[0.0, 0.0], [float("nan"), 1.0]])
def test_whatever_tells_rows_apart_the_result_is_the_same(monkeypatch, direction):
    monkeypatch.setattr(module, "_directions", lambda _length: torch.tensor(direction, dtype=torch.float64))
    matrix = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]])
    expected = torch.unique(matrix, dim=0, return_inverse=True)
    assert all(map(torch.equal, unique_rows(matrix), expected))
