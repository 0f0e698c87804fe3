"""Rollouts: several draws of each prompt, rewards by a scorer, negative-aware fine-tuning on all of them, in rounds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from artaug._internal.annotations import checked
from artaug._internal.arguments import check_argument, check_count, check_finite_number
from artaug._internal.prompts import check_disjoint, check_prompts, check_sample
from artaug.errors import InvalidValueError, NothingToLearnError
from artaug.evaluation.comparison import Comparison, compare
from artaug.lora.fusing import ConcatFuser, Fuser, fuse_loras
from artaug.lora.lora import LoRA
from artaug.pairs import ImagePair
from artaug.recipes.checks import check_learning
from artaug.recipes.draws import PromptDraws, RecipeFolder, draw_several
from artaug.recipes.rewards import draw_pairs, normalized_rewards
from artaug.run.checking import as_trainable
from artaug.run.results import rounds_ran
from artaug.scoring import Scorer, score_images
from artaug.synthesis import Synthesizer, held_out_seed, picture_seeds
from artaug.training import DifferentialLoRATrainer, NegativeAware, TrainingResult


@checked
@dataclass(frozen=True, kw_only=True)
class Rollout:
    """The draws of one prompt in one round, and their scores."""

    prompt: str
    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    skipped: bool
    """Whether its draws are all as good as one another, so that nothing was learned from them."""


@checked
@dataclass(frozen=True, kw_only=True)
class RolloutRound:
    """One round of `rollouts`."""

    number: int
    """Counted from 1."""
    rollouts: tuple[Rollout, ...]
    """One for each prompt, in their order."""
    training: TrainingResult
    """The training of this round alone."""
    lora: LoRA
    """All rounds up to this one, combined."""

    @property
    def skipped(self) -> int:
        """How many prompts were not learned from."""
        return sum(rollout.skipped for rollout in self.rollouts)


@checked
@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """The result of `rollouts`."""

    rounds: tuple[RolloutRound, ...]
    comparison: Comparison
    """Held-out prompts drawn by the base and after each round, scored by the scorer that was trained on and by the other one;
    the rows of the former are marked."""
    stop_reason: str
    """Why it ended, in words."""

    @property
    def lora(self) -> LoRA:
        """All rounds in one LoRA."""
        return self.rounds[-1].lora


@checked
def rollouts(  # noqa: PLR0913 - one verb over many nouns, as `enhance`
    prompts: Sequence[str],
    *,
    synthesizer: Synthesizer,
    scorer: Scorer,
    unseen: Scorer,
    held_out: Sequence[str],
    trainer: DifferentialLoRATrainer,
    objective: NegativeAware = NegativeAware(),  # noqa: B008 - a frozen value
    fuser: Fuser = ConcatFuser(),  # noqa: B008 - a frozen value
    draws: int = 8,
    rounds: int = 3,
    least_spread: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Rollouts:
    """Learn online from rewards: draw, score, learn from good and bad draws alike, and draw again (DiffusionNFT, 2509.16117).

    Every round draws each prompt several times with what the rounds before have learned. The scores become rewards in [0, 1],
    see `normalized_rewards`, and all draws are learned from by `NegativeAware`: those above the mean of their prompt attract,
    the others repel. A prompt whose draws all score the same says nothing, and is skipped and counted. A model that learns
    from a scorer soon learns what is wrong with it, so the result shows a scorer that it was not trained on.

    *The paper's:* draws of the current model, rewards normalized by prompt, and the loss on the forward process. *Ours:* the
    model of the round before is the teacher, where the paper moves its old policy along by an average at every step; a LoRA for
    each round, and their sum; the skipping. What is learned from are the latents that were sampled; a
    synthesizer that is no `artaug.training.KeepsLatents`, such as one on a cluster, is learned from by encoding its pictures.

    Args:
        prompts: what to draw and learn from.
        synthesizer: draws, and gives its model to the trainer.
        scorer: the reward.
        unseen: is shown only, on held-out prompts; it must not be computed from ``scorer``, nor the other way round.
        held_out: prompts to show both on, at least 2, none of them in ``prompts``.
        trainer: learns a LoRA from the draws of a round; ``objective`` replaces its own.
        objective: negative-aware fine-tuning.
        fuser: combines the LoRA of each round with that of the rounds before.
        draws: pictures of each prompt in each round, at least 2.
        rounds: how many at most; a round in which all prompts are skipped is the end.
        least_spread: a prompt is skipped unless its best score is above its worst by more than this.
        seed: of the run; the same arguments give the same LoRA.
        batch_size: the most pictures that are drawn at once.
        folder: keeps pictures and trainings: the same call on the same folder goes on where it stopped, and ends with the same
            LoRA to the bit. Pictures are scored again. Without it, those of a round are held in memory.
        progress: show progress bars.

    Raises:
        PromptError: if there are no prompts, one is blank, or one is also held out, or fewer than 2 are.
        InvalidValueError: if an argument is of another type or out of its range, or ``unseen`` depends on what ``scorer`` does.
        NothingToLearnError: if all prompts of the first round are skipped.

    Example:
        >>> import artaug as aa
        >>> from artaug import playground
        >>> from artaug.recipes import rollouts
        >>> from artaug.scorers import Chroma
        >>> result = rollouts(
        ...     playground.prompts(2, seed=0),
        ...     synthesizer=playground.synthesizer(steps=2),
        ...     scorer=Chroma(),
        ...     unseen=playground.Accuracy("color"),
        ...     held_out=playground.prompts(2, seed=1, held_out=True),
        ...     trainer=aa.DifferentialLoRATrainer(rank=2, steps=1, batch_size=1),
        ...     draws=2,
        ...     rounds=1,
        ...     progress=False,
        ... )
        >>> result.rounds[0].skipped, [row.scorer for row in result.comparison.rows]
        (0, ['Chroma', 'color'])
    """
    _check(prompts, held_out, synthesizer, scorer, unseen)
    for name, count, least in (("rounds", rounds, 1), ("batch_size", batch_size, 1), ("draws", draws, 2)):
        check_count("rollouts", name, count, least=least)
    check_finite_number("rollouts", "least_spread", least_spread)
    check_learning("rollouts", trainer, objective, NegativeAware, fuser)
    trainer = replace(trainer, objective=objective)
    trainer.check(as_trainable(synthesizer), pairs=len(prompts) * -(-draws // 2))
    # On a grey picture, as `enhance` does: its first real one is drawn after the last training.
    score_images(unseen, [Image.new("RGB", synthesizer.picture_size, "gray")], [held_out[0]])
    place, model = RecipeFolder(folder), synthesizer
    finished: list[RolloutRound] = []
    arms: dict[str, Synthesizer] = {}
    stop_reason = rounds_ran(rounds)
    for number in range(1, rounds + 1):
        teacher = place.keeping_latents(model)
        several = draw_several(
            place.drawing(teacher), prompts, count=draws, seed=seed, round_number=number, batch_size=batch_size
        )
        outcomes, pairs = _score(several, scorer, least_spread, place)
        if not pairs:
            stop_reason = f"the draws of each of the {len(outcomes)} prompts of round {number} score the same"
            if not finished:
                raise NothingToLearnError(f"{stop_reason}. Take a scorer that tells them apart, or other prompts.")
            break
        training = trainer.train(
            pairs,
            as_trainable(teacher),
            seed=picture_seeds(seed, number)[-1],
            checkpoints=place.checkpoints(number),
            progress=progress,
        )
        lora = fuse_loras(fuser, [*([finished[-1].lora] if finished else []), training.lora])
        finished.append(RolloutRound(number=number, rollouts=outcomes, training=training, lora=lora))
        # Each round trains on the model that drew for it; that of the base and all rounds draws for the next one.
        model = synthesizer.with_lora(lora)
        arms[f"round {number}"] = place.drawing(model)
    comparison = compare(
        place.drawing(synthesizer),
        arms,
        held_out,
        scorers=[scorer, unseen],
        seed=held_out_seed(seed),
        batch_size=batch_size,
        filtered_by=scorer.depends_on,
        progress=progress,
    )
    return Rollouts(rounds=tuple(finished), comparison=comparison, stop_reason=stop_reason)


def _score(
    draws: Iterator[PromptDraws], scorer: Scorer, least_spread: float, place: RecipeFolder
) -> tuple[tuple[Rollout, ...], list[ImagePair]]:
    """What came of each prompt, and what is learned from: all draws of those that are not skipped."""
    outcomes, images = [], []
    for several in draws:
        scores = tuple(score_images(scorer, several.images, [several.prompt] * len(several.images)))
        skipped = max(scores) - min(scores) <= least_spread
        outcomes.append(Rollout(prompt=several.prompt, seeds=several.seeds, scores=scores, skipped=skipped))
        images.append(() if skipped else place.kept(several.images))
    rewards = normalized_rewards(np.array([outcome.scores for outcome in outcomes]))
    pairs = [
        pair
        for outcome, pictures, mine in zip(outcomes, images, rewards.tolist(), strict=True)
        if not outcome.skipped
        for pair in draw_pairs(outcome.prompt, pictures, mine)
    ]
    return tuple(outcomes), pairs


def _check(
    prompts: Sequence[str], held_out: Sequence[str], synthesizer: Synthesizer, scorer: Scorer, unseen: Scorer
) -> None:
    """Refuse what can be known to be wrong before the first picture."""
    check_prompts(prompts)
    check_sample("rollouts(held_out=...)", held_out)
    check_disjoint(held_out, prompts, owner="held_out", are="learned from", why="They would show what was trained on.")
    check_argument("rollouts", "synthesizer", synthesizer, Synthesizer)
    check_argument("rollouts", "scorer", scorer, Scorer)
    check_argument("rollouts", "unseen", unseen, Scorer)
    if shared := sorted(scorer.depends_on & unseen.depends_on):
        raise InvalidValueError(
            f"rollouts: scorer and unseen both depend on {', '.join(shared)}, so that unseen would show what was trained on. "
            "Give it a scorer of another kind."
        )
