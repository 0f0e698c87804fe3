"""DreamSync: several candidates of each prompt, two scorers, the best of those that pass, fine-tuning, and again."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from artaug._internal.annotations import checked
from artaug._internal.arguments import check_argument, check_count
from artaug._internal.prompts import check_prompts
from artaug.errors import InvalidValueError, NothingToLearnError
from artaug.filtering import Floor, PairFilter, judge_pairs
from artaug.lora.fusing import ConcatFuser, Fuser, fuse_loras
from artaug.pairs import Attempt, Dropped, ImagePair, Kept, Verdict
from artaug.recipes.checks import check_learning
from artaug.recipes.draws import PromptDraws, RecipeFolder, draw_several
from artaug.run.checking import as_trainable
from artaug.run.results import Enhancement, Round, no_pairs_reason, rounds_ran
from artaug.synthesis import Synthesizer, picture_seeds
from artaug.training import DifferentialLoRATrainer, SupervisedFineTuning


@checked
def dreamsync(  # noqa: PLR0913 - one verb over many nouns, as `enhance`
    prompts: Sequence[str],
    *,
    synthesizer: Synthesizer,
    faithful: Floor,
    beautiful: Floor,
    trainer: DifferentialLoRATrainer,
    objective: SupervisedFineTuning = SupervisedFineTuning(),  # noqa: B008 - a frozen value
    fuser: Fuser = ConcatFuser(),  # noqa: B008 - a frozen value
    candidates: int = 8,
    rounds: int = 3,
    seed: int = 0,
    batch_size: int = 8,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Enhancement:
    """Fine-tune a model on the best of its own pictures, round after round (DreamSync, arXiv 2311.17946).

    Every round draws several candidates of each prompt with what the rounds before have learned. A prompt is kept if one of its
    candidates passes both thresholds; of those that pass, the most beautiful one is learned from, by plain fine-tuning of a LoRA.
    It is the control arm of ArtAug: no critic, no region, no difference.

    *The paper's:* several candidates, one judge of faithfulness (visual question answering) and one of beauty, the best of those
    that both pass, a LoRA with the plain denoising loss, and rounds. *Ours:* which of the two scores decides among those
    that pass; each round is a LoRA on top of those before, and the result is their sum. *Not in what we read:* the number of
    candidates, both thresholds, and the settings of the training; all defaults are ours.

    Args:
        prompts: what to draw and learn from.
        synthesizer: draws, and gives its model to the trainer.
        faithful: whether a picture shows what its prompt says, such as ``Floor(VQAScore.from_pretrained(...), at_least=0.9)``.
        beautiful: whether it looks good enough; its scorer also chooses the best one.
        trainer: learns a LoRA from the kept pictures of a round; ``objective`` replaces its own.
        objective: the plain denoising loss.
        fuser: combines the LoRA of each round with that of the rounds before.
        candidates: pictures of each prompt in each round.
        rounds: how many at most; a round that keeps nothing is the end.
        seed: of the run; the same arguments give the same LoRA.
        batch_size: the most pictures that are drawn at once.
        folder: keeps pictures and trainings: the same call on the same folder goes on where it stopped, and ends with the same
            LoRA to the bit. Pictures are scored again. Without it, what is learned from is held in memory.
        progress: show progress bars of the trainings.

    Returns:
        The rounds; every prompt of each is `Kept` or `Dropped`, with its scores. A pair's *before* is its *after*: the picture.

    Raises:
        PromptError: if there are no prompts or one is blank.
        InvalidValueError: if an argument is of another type or out of its range, or both scorers have one name.
        NothingToLearnError: if the first round keeps nothing; the message counts the prompts.

    Example:
        >>> import artaug as aa
        >>> from artaug import playground
        >>> from artaug.recipes import dreamsync
        >>> from artaug.scorers import Photometric
        >>> result = dreamsync(
        ...     playground.prompts(2, seed=0),
        ...     synthesizer=playground.synthesizer(steps=2),
        ...     faithful=aa.Floor(playground.Accuracy("color"), at_least=0.0),
        ...     beautiful=aa.Floor(Photometric(), at_least=0.0),
        ...     trainer=aa.DifferentialLoRATrainer(rank=2, steps=1, batch_size=1),
        ...     candidates=2,
        ...     rounds=1,
        ...     progress=False,
        ... )
        >>> [type(attempt).__name__ for attempt in result.rounds[0].attempts]
        ['Kept', 'Kept']
    """
    _check(prompts, synthesizer, faithful, beautiful)
    for name, count in (("candidates", candidates), ("rounds", rounds), ("batch_size", batch_size)):
        check_count("dreamsync", name, count)
    check_learning("dreamsync", trainer, objective, SupervisedFineTuning, fuser)
    trainer = replace(trainer, objective=objective)
    trainer.check(as_trainable(synthesizer), pairs=len(prompts))
    keep, place, model = faithful & beautiful, RecipeFolder(folder), synthesizer
    finished: list[Round] = []
    for number in range(1, rounds + 1):
        drawn = draw_several(
            place.drawing(model), prompts, count=candidates, seed=seed, round_number=number, batch_size=batch_size
        )
        attempts = list(_attempts(drawn, keep, f"{beautiful.scorer.name} after", place))
        if (nothing := no_pairs_reason(number, attempts)) is not None:
            if not finished:
                raise NothingToLearnError(f"{nothing}. Lower a threshold, or draw more candidates.")
            return Enhancement(rounds=tuple(finished), stop_reason=nothing)
        pairs = [attempt.pair for attempt in attempts if isinstance(attempt, Kept)]
        # Each round trains on the model that drew for it; that of the base and all rounds draws for the next one.
        training = trainer.train(
            pairs,
            as_trainable(model),
            seed=picture_seeds(seed, number)[-1],
            checkpoints=place.checkpoints(number),
            progress=progress,
        )
        lora = fuse_loras(fuser, [*([finished[-1].lora] if finished else []), training.lora])
        finished.append(
            Round(
                number=number,
                attempts=attempts,
                training=training,
                lora=lora,
                seconds={"train": training.seconds},
                gain=None,
                accepted=True,
            )
        )
        model = synthesizer.with_lora(lora)
    return Enhancement(rounds=tuple(finished), stop_reason=rounds_ran(rounds))


def _attempts(draws: Iterator[PromptDraws], keep: PairFilter, score: str, place: RecipeFolder) -> Iterator[Attempt]:
    """How each prompt ends: with the best candidate of those that pass, or the best one if none does."""
    for several in draws:
        pictures = zip(several.images, several.seeds, strict=True)
        pairs = [ImagePair.unchanged(image, prompt=several.prompt, seed=seed) for image, seed in pictures]
        verdicts = judge_pairs(keep, pairs)
        passed = sum(verdict.keep for verdict in verdicts)
        verdict, pair = max(
            zip(verdicts, pairs, strict=True), key=lambda candidate: (candidate[0].keep, candidate[0].scores[score])
        )
        reason = f"{passed} of {len(pairs)} candidates pass; of the best one, {verdict.reason}"
        ended = Kept if verdict.keep else Dropped
        (picture,) = place.kept([pair.after])
        yield ended(pair.holding(picture, picture), Verdict(verdict.keep, reason, verdict.scores))


def _check(prompts: Sequence[str], synthesizer: Synthesizer, faithful: Floor, beautiful: Floor) -> None:
    """Refuse what can be known to be wrong before the first picture."""
    check_prompts(prompts)
    check_argument("dreamsync", "synthesizer", synthesizer, Synthesizer)
    check_argument("dreamsync", "faithful", faithful, Floor)
    check_argument("dreamsync", "beautiful", beautiful, Floor)
    if faithful.scorer.name == beautiful.scorer.name:
        raise InvalidValueError(
            f"dreamsync: faithful and beautiful are both by the scorer {beautiful.scorer.name!r}. Give it two different ones."
        )
