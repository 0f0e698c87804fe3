"""The questions of a chunk in another thread: whenever that thread ends, the chunk goes on."""

from concurrent.futures import Future

import pytest

import artaug as aa
from artaug.run.asking import Asking
from artaug.run.storage.journal import ChunkJournal
from artaug.run.storage.records import Member
from artaug.testing import FixedCritic, SwatchSynthesizer

ADVICE = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a window"),))


class Forgets(ChunkJournal):
    def add_call(self, stage, plans, images, *, limit):
        raise NotImplementedError

    def add_answer(self, member, answer):
        pass

    def finish(self, chunk):
        raise NotImplementedError


class EndsBetween(Future):
    """Of a thread that ends just after somebody has looked whether it has, for the nth time."""

    def __init__(self, look):
        super().__init__()
        self.looks_left = look

    def done(self):
        was_done = super().done()
        self.looks_left -= 1
        if self.looks_left == 0 and not was_done:
            self.set_result(None)
        return was_done


class AsksAtOnce:
    """A lane whose thread has asked everything before anybody looks, and ends between two looks."""

    def __init__(self, look):
        self.future = EndsBetween(look)

    def submit(self, function):
        function()
        return self.future


@pytest.mark.parametrize("look", [1, 2, 3])
def test_a_thread_that_ends_between_two_looks_leaves_nobody_waiting(look):
    members = [Member(0, 0), Member(1, 0)]
    pictures = [SwatchSynthesizer().synthesize(aa.Plan("a"), seed=seed) for seed in range(2)]
    asking = Asking(FixedCritic(ADVICE), members, pictures, ["a", "b"], Forgets(), lambda: 0.0)
    lane, arrived = AsksAtOnce(look), []
    for future in asking.there(lane, arrived.append):
        if not lane.future.looks_left:
            assert future.done()
    assert [arrival.member for arrival in arrived] == members
