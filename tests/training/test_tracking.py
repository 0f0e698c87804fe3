"""Steps and validations sent to a real tracker and read back from its files."""

import pytest
from PIL import Image

from artaug.errors import InvalidValueError, MissingExtraError
from artaug.training import DifferentialLoRATrainer, ValidationResult, open_tracker


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
