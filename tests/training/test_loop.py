"""The training loop: what happens at which step, and that a training resumed anywhere takes the same way."""

from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.training.conftest import TinyModel, TinySynthesizer, make_pair

from artaug.errors import ModelError
from artaug.scorers import FunctionScorer
from artaug.training import Checkpoints, DifferentialLoRATrainer, TwoStage, Validation
from artaug.training.loop import _next_multiple

PAIRS = [make_pair(1), make_pair(2)]
BRIGHTNESS = FunctionScorer(
    function=lambda image, _: image.convert("L").resize((1, 1)).getpixel((0, 0)) / 255, name="bright"
)


def trainer_of(steps, **options):
    return DifferentialLoRATrainer(
        **{"rank": 1, "steps": steps, "batch_size": 2, "targets": "blocks.0.attn", "learning_rate": 1e-2, **options}
    )


class Recorder(Checkpoints):
    """Checkpoints that note when they are written, and one list of all that happens."""

    def __init__(self, folder, every, events):
        super().__init__(folder=folder, every=every, keep=1000)
        object.__setattr__(self, "events", events)

    def write(self, state, *, run_fingerprint):
        super().write(state, run_fingerprint=run_fingerprint)
        self.events.append(("checkpoint", state.step))


def events_of(folder, trainer, *, checkpoint_every, validate_every, stop_at=None, **options):
    """What happens in a training, in its order: steps, validations, checkpoints."""
    events = []

    def on_step(event):
        events.append(("step", event.step))
        if event.step == stop_at:
            raise KeyboardInterrupt

    validation = validate_every and Validation(
        scorer=BRIGHTNESS,
        prompts=["a"],
        every=validate_every,
        on_validation=lambda result: events.append(("validation", result.step)),
        **options,
    )
    checkpoints = Recorder(folder, checkpoint_every, events)
    try:
        trainer.train(
            PAIRS,
            TinySynthesizer(),
            seed=0,
            checkpoints=checkpoints,
            validation=validation,
            on_step=on_step,
            progress=False,
        )
    except KeyboardInterrupt:
        assert stop_at is not None
    return events


def expected_events(steps, checkpoint_every, validate_every):
    if validate_every:
        yield "checkpoint", 0  # of what the base scores
    for step in range(1, steps + 1):
        yield "step", step
        is_validated = validate_every and (step % validate_every == 0 or step == steps)
        if is_validated:
            yield "validation", step
        if is_validated or step % checkpoint_every == 0 or step == steps:
            yield "checkpoint", step


intervals = st.integers(1, 9)


@settings(max_examples=15)
@given(steps=st.integers(1, 8), checkpoint_every=intervals, validate_every=st.none() | intervals)
def test_checkpoints_and_validations_come_at_their_multiples_and_at_the_end(
    tmp_path_factory, steps, checkpoint_every, validate_every
):
    events = events_of(
        tmp_path_factory.mktemp("run"),
        trainer_of(steps),
        checkpoint_every=checkpoint_every,
        validate_every=validate_every,
    )
    # Where both are due the validation comes first, or a kill between the two would lose it.
    assert events == list(expected_events(steps, checkpoint_every, validate_every))


@settings(max_examples=12)
@given(checkpoint_every=intervals, validate_every=st.none() | intervals, stop_at=st.integers(1, 8))
def test_a_resumed_training_goes_on_after_its_newest_checkpoint(
    tmp_path_factory, checkpoint_every, validate_every, stop_at
):
    intervals_of_run = {"checkpoint_every": checkpoint_every, "validate_every": validate_every}
    folder, all_events = tmp_path_factory.mktemp("run"), list(expected_events(8, **intervals_of_run))
    stopped = events_of(folder, trainer_of(8), stop_at=stop_at, **intervals_of_run)
    assert stopped == all_events[: all_events.index(("step", stop_at)) + 1]
    written = [event for event in stopped if event[0] == "checkpoint"]
    remaining = all_events[all_events.index(written[-1]) + 1 :] if written else all_events
    assert events_of(folder, trainer_of(8), **intervals_of_run) == remaining
    assert events_of(folder, trainer_of(8), **intervals_of_run) == []


def test_a_training_of_several_phases_is_validated_at_its_end_only(tmp_path):
    trainer = trainer_of(8, objective=TwoStage())
    events = events_of(tmp_path, trainer, checkpoint_every=3, validate_every=1)
    assert [step for kind, step in events if kind == "validation"] == [8]
    assert [step for kind, step in events if kind == "checkpoint"] == [0, 3, 6, 8]


@pytest.mark.parametrize("stop_at", [2, 3, 4, 5, 7])
def test_a_training_of_several_phases_resumes_within_any_of_them(tmp_path, stop_at):
    trainer = trainer_of(8, objective=TwoStage())
    uninterrupted = trainer.train(PAIRS, TinySynthesizer(), seed=0, progress=False)
    events_of(tmp_path, trainer, checkpoint_every=1, validate_every=None, stop_at=stop_at)
    resumed = trainer.train(
        PAIRS, TinySynthesizer(), seed=0, checkpoints=Checkpoints(folder=tmp_path, every=1), progress=False
    )
    assert resumed.losses == uninterrupted.losses
    assert resumed.lora.digest == uninterrupted.lora.digest


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_a_training_whose_pictures_never_get_better_stops_after_its_patience(tmp_path, patience):
    trainer = trainer_of(30, learning_rate=1e-12)  # ties with the base: nothing is better than the first validation
    events = events_of(tmp_path, trainer, checkpoint_every=100, validate_every=2, patience=patience)
    assert events[-2:] == [("validation", 2 * (1 + patience)), ("checkpoint", 2 * (1 + patience))]


class RecordingModel(TinyModel):
    """A model that records when it is borrowed and offloaded."""

    def __init__(self):
        super().__init__()
        self.events = []

    @contextmanager
    def _recorded(self, name):
        self.events.append(f"without {name}")
        yield
        self.events.append(f"with {name}")

    def without_encoders(self):
        return self._recorded("encoders")

    def without_denoiser(self):
        return self._recorded("denoiser")

    @contextmanager
    def training(self):
        self.events.append("borrowed")
        with super().training() as model:
            yield model
        self.events.append("given back")


def test_the_encoders_make_room_before_the_denoiser_is_back():
    model = RecordingModel()
    trainer_of(2).train(PAIRS, model, seed=0, progress=False)
    first = ["borrowed", "given back"]  # for the checks before anything is encoded
    assert model.events == [
        *first,
        *("borrowed", "without denoiser", "without encoders", "with denoiser", "with encoders", "given back"),
    ]


def test_pairs_are_encoded_once_for_all_loans_of_the_model():
    synthesizer = TinySynthesizer(RecordingModel())
    validation = Validation(scorer=BRIGHTNESS, prompts=["a"], every=1)
    trainer_of(3).train(PAIRS, synthesizer, seed=0, validation=validation, progress=False)
    assert synthesizer.model.calls.images == 2 * len(PAIRS)
    assert synthesizer.model.events.count("without denoiser") == 1
    assert synthesizer.model.events.count("without encoders") == 3


def test_a_model_that_draws_no_pictures_cannot_be_validated(tiny_model):
    validation = Validation(scorer=BRIGHTNESS, prompts=["a"])
    with pytest.raises(ModelError, match="validation draws pictures, and TinyModel cannot draw any"):
        trainer_of(1).train(PAIRS, tiny_model, seed=0, validation=validation)


@given(step=st.integers(0, 100), every=st.integers(1, 20))
def test_the_next_multiple_lies_behind_the_step(step, every):
    found = _next_multiple(step, every)
    assert found % every == 0
    assert step < found <= step + every
