"""The benchmark of compiled blocks: a row for each method and way, and the model is compiled once."""

import json

import pytest
from benchmarks import _grid as grid
from benchmarks import compiled

from support.tiny_geometry import TINY


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of torch
def test_plain_and_guided_steps_are_measured_as_written_and_compiled():
    rows = compiled.point_rows(grid.Point(tokens=64, regions=2, geometry=TINY), rounds=2, backend="eager")
    measured = [(row["method"], row["compiled"]) for row in rows]
    assert measured == [("plain", False), ("auto", False), ("plain", True), ("auto", True)]
    assert rows[0]["ratio_to_plain"] == rows[2]["ratio_to_compiled"] == 1
    assert all(row["seconds"] > 0 and row["first_seconds"] > 0 for row in rows)
    json.dumps(rows)
    assert len(compiled.plot(rows).axes) == 1
