"""A finished round, written to its folder and read from there."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from artaug.evaluation.comparison import Comparison
from artaug.image_files import ImageFile, StoredImages, image_digest
from artaug.run.results import Round
from artaug.run.storage.attempts import StoredAttempts
from artaug.run.storage.round_folder import ComparisonRecord, ImageRecord, ResultRecord, RoundFolder, ValidationRecord
from artaug.training import TrainingResult, ValidationResult


def write_round(folder: RoundFolder, finished: Round) -> Round:
    """Write a round whose attempts are in the folder already: the same round, with all its pictures on disk.

    Raises:
        StorageError: if it cannot be written.
    """
    comparison, training = finished.comparison, finished.training
    if comparison is not None:
        arms = {"base": comparison.base, **comparison.candidates}
        files = {
            name: arm.images.files if isinstance(arm.images, StoredImages) else folder.images.add_all(arm.images)
            for name, arm in arms.items()
        }
        images = {name: tuple(ImageRecord(image_digest(file), file.size) for file in files[name]) for name in files}
        folder.write_comparison(ComparisonRecord(comparison.to_dict(), images))
        comparison = _with_images(comparison, files)
    record = ResultRecord(
        losses=training.losses,
        pairs=training.pairs,
        steps=training.steps,
        training_seconds=training.seconds,
        validations=tuple(ValidationRecord(**item.to_dict()) for item in training.validations),
        skipped_steps=training.skipped_steps,
        seconds=dict(finished.seconds),
        gain=finished.gain,
        accepted=finished.accepted,
    )
    folder.write_result(record, learned=training.lora, combined=finished.lora)  # last: with it the round is finished
    folder.remove_checkpoints()
    return replace(finished, comparison=comparison)


def read_round(folder: RoundFolder, number: int) -> Round | None:
    """The round, if it is finished.

    Raises:
        StorageError: if a file is damaged.
    """
    stored = folder.result()
    if stored is None:
        return None
    record, learned, combined = stored
    return Round(
        number=number,
        attempts=StoredAttempts(folder),
        training=TrainingResult(
            lora=learned,
            losses=record.losses,
            pairs=record.pairs,
            steps=record.steps,
            seconds=record.training_seconds,
            validations=tuple(
                ValidationResult(step=item.step, strength=item.strength, win_rate=item.win_rate, gain=item.gain)
                for item in record.validations
            ),
            skipped_steps=record.skipped_steps,
        ),
        lora=combined,
        seconds=record.seconds,
        gain=record.gain,
        accepted=record.accepted,
        comparison=read_comparison(folder),
    )


def read_comparison(folder: RoundFolder) -> Comparison | None:
    """The comparison of a round with the one before, if one was made; its pictures are read when they are looked at.

    Raises:
        StorageError: if the file is damaged.
    """
    record = folder.comparison()
    if record is None:
        return None
    files = {
        name: [folder.images.get(image.digest, size=image.size) for image in images]
        for name, images in record.images.items()
    }
    return _with_images(Comparison.from_dict(record.comparison), files)


def _with_images(comparison: Comparison, files: Mapping[str, Sequence[ImageFile]]) -> Comparison:
    """The comparison with its pictures by reference, those of each arm by its name."""
    base = replace(comparison.base, images=StoredImages(tuple(files["base"])))
    candidates = {
        name: replace(arm, images=StoredImages(tuple(files[name]))) for name, arm in comparison.candidates.items()
    }
    return replace(comparison, base=base, candidates=candidates)
