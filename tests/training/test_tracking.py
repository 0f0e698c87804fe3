"""Steps and validations sent to a real tracker and read back from its files."""

import pytest
from PIL import Image

import artaug as aa
from artaug.errors import InvalidValueError, MissingExtraError
from artaug.training import DifferentialLoRATrainer, StepEvent, ValidationResult, open_tracker


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own, on this numpy and protobuf
def test_tensorboard_gets_every_step_and_the_held_out_pictures(tmp_path, tiny_model, two_pairs):
    trainer = DifferentialLoRATrainer(rank=2, steps=3)
    result = ValidationResult(
        step=3, strength=1.0, win_rate=0.75, gain=0.5, images=(Image.new("RGB", (8, 8), "red"),) * 2
    )
    with open_tracker("tensorboard", "first", folder=tmp_path, config={"rank": 2}) as tracker:
        training = trainer.train(two_pairs, tiny_model, seed=0, on_step=tracker.log_step)
        tracker.log_validation(result)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    written = EventAccumulator(str(tmp_path / "first"))
    written.Reload()
    losses = [(event.step, event.value) for event in written.Scalars("train/loss")]
    assert losses == [(step, pytest.approx(loss)) for step, loss in enumerate(training.losses, start=1)]
    assert [event.value for event in written.Scalars("validation/strength_1/win_rate")] == [0.75]
    assert written.Tags()["images"] == ["validation/strength_1"]
    (pictures,) = written.Images("validation/strength_1")
    assert (pictures.width, pictures.height) == (16, 8)  # side by side, as TensorBoard shows a batch


def test_an_unknown_tracker_is_refused_naming_the_known_ones():
    with (
        pytest.raises(InvalidValueError, match=r"no tracker 'notebook'\. Choose of: .*tensorboard.*wandb"),
        open_tracker("notebook", "first"),
    ):
        pytest.fail("the block ran")


def test_a_tracker_that_is_not_installed_names_what_to_install():
    with (
        pytest.raises(MissingExtraError, match=r"needs the aim package\. Run: pip install aim"),
        open_tracker("aim", "first"),
    ):
        pytest.fail("the block ran")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own, on this numpy and protobuf
def test_a_run_is_logged_on_one_axis_with_the_yield_and_the_gain_of_every_round(tmp_path, tiny_model, two_pairs):
    training = DifferentialLoRATrainer(rank=2, steps=2).train(two_pairs, tiny_model, seed=0, progress=False)
    step = {"steps": 2, "loss": 0.5, "gradient_norm": 1.0, "learning_rate": 1e-3, "pairs_per_second": 1.0}
    kept = aa.Kept(two_pairs[0], aa.Verdict(True, "better", {}))
    skipped = aa.Skipped("a hill", 0, "nothing to improve", "plan")
    finished = aa.Round(
        number=2,
        attempts=(kept, skipped, skipped, kept),
        training=training,
        lora=training.lora,
        seconds={"draw": 3.0},
        gain=aa.ScoreRow("Chroma", "after", 0.0, 0.25, 0.25, 0.125, 0.5, 1.0, 9),
        accepted=True,
    )
    with open_tracker("tensorboard", "first", folder=tmp_path) as tracker:
        for number in (1, 2):
            event = StepEvent(step=number, peak_bytes=0, seconds=1.0, round_number=2, steps_before=2, **step)
            tracker.log_event(event)
        tracker.log_event(aa.StageEvent(round_number=2, stage="train", seconds=1.0, count=2))  # no numbers of a run
        tracker.log_validation(ValidationResult(step=2, strength=1.0, win_rate=0.75, gain=0.5))
        tracker.log_event(aa.RoundEvent(round=finished, run_step=4))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    written = EventAccumulator(str(tmp_path / "first"))
    written.Reload()

    def points(tag):
        return [(event.step, event.value) for event in written.Scalars(tag)]

    assert points("train/loss") == [(3, 0.5), (4, 0.5)]
    assert points("validation/strength_1/win_rate") == [(4, 0.75)]
    assert points("round/yield") == [(4, 0.5)]
    assert [points(f"round/{name}") for name in ("kept", "dropped", "skipped")] == [[(4, 2)], [(4, 0)], [(4, 2)]]
    assert [points(f"round/{name}") for name in ("gain", "gain_low", "gain_high")] == [
        [(4, 0.25)],
        [(4, 0.125)],
        [(4, 0.5)],
    ]
    assert points("round/seconds_draw") == [(4, 3.0)]
