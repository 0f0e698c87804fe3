import pytest

from artaug import playground
from artaug.testing import check_scorer

TWO = "a red cone on the left and a blue ball on the right at night"


@pytest.mark.parametrize(
    ("rendered", "requested", "color", "shape", "place"),
    [
        (TWO, TWO, 1.0, 1.0, 1.0),
        (TWO, TWO + ", vivid, sharp", 1.0, 1.0, 1.0),
        ("a red cone on the left and a green ball on the right at night", TWO, 0.5, 1.0, 1.0),
        ("a red cone on the left and a blue cube on the right at night", TWO, 1.0, 0.5, 1.0),
        ("a red cone on the left and a blue ball in the middle at night", TWO, 1.0, 1.0, 0.5),
        ("a red cone on the left at night", TWO, 0.5, 0.5, 0.5),
        ("at night", TWO, 0.0, 0.0, 0.0),
    ],
)
def test_accuracy_is_the_share_of_requested_things_that_are_right(rendered, requested, color, shape, place):
    image = playground.render(rendered, seed=0)
    found = [playground.Accuracy(of).score(image, requested) for of in ("color", "shape", "place")]
    assert found == [color, shape, place]


def test_its_name_in_tables_is_what_it_measures():
    assert [playground.Accuracy(of).name for of in ("color", "shape", "place")] == ["color", "shape", "place"]


def test_a_prompt_from_another_world_is_an_error():
    with pytest.raises(playground.CaptionError, match="lighthouse"):
        check_scorer(playground.Accuracy("color"))
