"""Calls of a synthesizer: their sizes where memory runs out, and faults that pass."""

import threading
from dataclasses import dataclass, field

import pytest
import torch
from PIL import Image

import artaug as aa
from artaug._internal.memory import FittingBatches
from artaug.synthesis import Undrawn, draw, draw_batches, draw_files, draw_in_calls
from artaug.testing import SwatchSynthesizer
from support.clock import FakeTime

PLANS, SEEDS = [aa.Plan(f"scene {index}") for index in range(11)], list(range(11))


@dataclass
class Limited(aa.Synthesizer):
    """Draws so many pictures together, and runs out of memory with more."""

    fits: int
    sizes: list[int] = field(default_factory=list)

    def synthesize(self, plan, *, seed):
        return self.synthesize_batch([plan], seeds=[seed])[0]

    def synthesize_batch(self, plans, *, seeds):
        self.sizes.append(len(plans))
        if len(plans) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [SwatchSynthesizer().synthesize(plan, seed=seed) for plan, seed in zip(plans, seeds, strict=True)]


@pytest.mark.parametrize("fits", [1, 2, 3, 5, 11])
def test_pictures_are_those_of_one_call_whatever_fits(fits):
    expected = draw(SwatchSynthesizer(), PLANS, seeds=SEEDS)
    drawn = draw(Limited(fits), PLANS, seeds=SEEDS)
    assert [image.tobytes() for image in drawn] == [image.tobytes() for image in expected]


def test_calls_name_their_members_and_the_size_that_fits_is_kept():
    synthesizer, batches = Limited(4), FittingBatches(8)
    calls = [*draw_in_calls(synthesizer, PLANS, seeds=SEEDS, batches=batches)]
    assert [call.members for call in calls] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10)]
    assert all(len(call.images) == len(call.members) for call in calls)
    list(draw_in_calls(synthesizer, PLANS, seeds=SEEDS, batches=batches))
    assert synthesizer.sizes == [8, 4, 4, 3, 4, 4, 3]


def test_pictures_drawn_before_memory_ran_out_are_kept():
    class Leaks(Limited):
        def synthesize_batch(self, plans, *, seeds):
            if len(self.sizes) == 2:
                raise MemoryError
            return super().synthesize_batch(plans, seeds=seeds)

    calls = []
    with pytest.raises(MemoryError):
        calls.extend(draw_in_calls(Leaks(1), PLANS, seeds=SEEDS, batches=FittingBatches(1)))
    assert [call.members for call in calls] == [(0,), (1,)]


def test_a_picture_that_alone_does_not_fit_names_its_plan_and_says_what_to_do():
    with pytest.raises(torch.OutOfMemoryError) as caught:
        draw(Limited(0), PLANS, seeds=SEEDS)
    notes = "\n".join(caught.value.__notes__)
    assert "Raised by Limited, for the plan of 'scene 0'." in notes
    assert "Limited ran out of memory at a single picture. Offload the pipeline" in notes


@pytest.mark.parametrize("in_batches", [False, True])
def test_a_bug_of_a_synthesizer_names_it_and_the_plan(in_batches):
    class Broken(aa.Synthesizer):
        def synthesize(self, plan, *, seed):
            return {"scene 0": Image.new("RGB", (8, 8))}[plan.prompt]

    class BrokenInBatches(Broken):
        def synthesize_batch(self, plans, *, seeds):
            return [self.synthesize(plan, seed=seed) for plan, seed in zip(plans, seeds, strict=True)]

    source = "BrokenInBatches raised" if in_batches else "Broken raised"
    inputs = "3 plans, first prompt 'scene 0'" if in_batches else "the plan of 'scene 1'"
    with pytest.raises(aa.PartError, match=f"{source} KeyError: 'scene 1', for {inputs}") as caught:
        draw(BrokenInBatches() if in_batches else Broken(), PLANS[:3], seeds=SEEDS[:3])
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_synthesizer_that_times_out_is_called_again_for_the_same_picture_only(monkeypatch):
    clock, asked = FakeTime(), []
    monkeypatch.setattr("artaug._internal.calls.time", clock)

    class Served(aa.Synthesizer):
        def synthesize(self, plan, *, seed):
            asked.append(seed)
            if len(asked) == 2:
                raise TimeoutError("read timed out")
            return Image.new("RGB", (8, 8))

    assert len(draw(Served(), PLANS[:3], seeds=SEEDS[:3])) == 3
    assert asked == [0, 1, 1, 2]
    assert len(clock.slept) == 1


def test_batches_that_are_drawn_elsewhere_are_drawn_beside_each_other_and_come_in_their_order():
    meeting = threading.Barrier(3, timeout=20)

    @dataclass(frozen=True)
    class DrawsElsewhere(aa.Synthesizer):
        max_concurrency: int = 3

        def synthesize(self, plan, *, seed):
            meeting.wait()  # three calls, or none goes on
            return SwatchSynthesizer().synthesize(plan, seed=seed)

    batches = [([aa.Plan(f"prompt {number}")], [number]) for number in range(9)]
    drawn = list(draw_batches(DrawsElsewhere(), batches))
    assert drawn == list(draw_batches(SwatchSynthesizer(), batches))


def test_what_one_batch_raises_elsewhere_is_raised_in_its_place():
    @dataclass(frozen=True)
    class Fails(aa.Synthesizer):
        max_concurrency: int = 2

        def synthesize(self, plan, *, seed):
            if seed == 3:
                raise ArithmeticError("no")
            return SwatchSynthesizer().synthesize(plan, seed=seed)

    drawn = draw_batches(Fails(), [([aa.Plan("a")], [number]) for number in range(6)])
    assert [len(next(drawn)) for _ in range(3)] == [1, 1, 1]
    with pytest.raises(aa.PartError, match="ArithmeticError: no"):
        next(drawn)


def test_pictures_that_a_synthesizer_leaves_in_memory_are_stored_and_reasons_stay_in_their_places(tmp_path):
    @dataclass(frozen=True)
    class FailsAtTwo(aa.Synthesizer):
        def synthesize(self, plan, *, seed):
            return SwatchSynthesizer().synthesize(plan, seed=seed)

        def synthesize_each(self, plans, *, seeds, folder=None):
            drawn = self.synthesize_batch(plans, seeds=seeds)
            return [
                Undrawn("it is the third") if seed == 2 else image for image, seed in zip(drawn, seeds, strict=True)
            ]

    folder = aa.ImageFolder(tmp_path)
    (call,) = draw_in_calls(FailsAtTwo(), PLANS[:4], seeds=SEEDS[:4], batches=FittingBatches(4), folder=folder)
    plain = [SwatchSynthesizer().synthesize(plan, seed=seed) for plan, seed in zip(PLANS[:4], SEEDS[:4], strict=True)]
    assert call.images[2] == Undrawn("it is the third")
    assert [call.images[place].load() for place in (0, 1, 3)] == [plain[place] for place in (0, 1, 3)]
    with pytest.raises(aa.ModelError, match="it is the third"):
        draw_files(FailsAtTwo(), PLANS[:4], seeds=SEEDS[:4], folder=folder)


def test_a_picture_that_was_not_drawn_needs_a_reason():
    with pytest.raises(aa.InvalidValueError, match="needs a reason"):
        Undrawn(" ")
