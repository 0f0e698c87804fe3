"""Did it get better, and how sure is that: synthesizers drawn side by side with the same seeds, in paired statistics."""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from artaug.evaluation.comparison.comparison import Arm, Comparison
from artaug.evaluation.comparison.evaluator import Evaluator, HasScorers, check, names_of, rows_of
from artaug.evaluation.comparison.rows import Guardrail, ScoreRow, ScoringFailure
from artaug.evaluation.comparison.scoring_log import ScoringLog
from artaug.images.similarity import SimilarityMetric
from artaug.scoring import Scorer
from artaug.synthesis import Synthesizer, picture_seeds

__all__ = ["Arm", "Comparison", "Guardrail", "HasScorers", "ScoreRow", "ScoringFailure", "compare"]


def compare(  # noqa: PLR0913 - one verb, and all of these have a default
    base: Synthesizer,
    candidates: Mapping[str, Synthesizer],
    prompts: Sequence[str],
    *,
    scorers: Sequence[Scorer],
    seed: int = 0,
    images_per_prompt: int = 1,
    diversity: SimilarityMetric | None = None,
    guardrails: Sequence[Guardrail] = (),
    batch_size: int = 8,
    filtered_by: Collection[str | HasScorers] = (),
    keep_images: int = 12,
    progress: bool = True,
) -> Comparison:
    """Draw the same prompts with the same seeds by a base and by candidates, and compare their scores in pairs.

    The base is drawn once. Only the first pictures are held in memory, the others are scored and let go.

    Args:
        base: what the candidates are measured against.
        candidates: by the name tables call them.
        prompts: what to draw, at least 2; best held out from training.
        scorers: judge the pictures; their names must differ.
        seed: of the seeds and of the bootstrap; the same arguments give the same comparison.
        batch_size: pictures drawn and scored at a time.
        images_per_prompt: pictures a prompt, each with a seed of its own; a prompt still counts once, by the mean of its pictures.
        diversity: how alike two pictures are (`ImageSimilarity`, or a function of two pictures); adds a row ``diversity``, 1
            less the mean likeness of the pictures of a prompt, which needs two draws.
        guardrails: how far which rows may fall, for `Comparison.verdict`.
        filtered_by: what chose the training pairs, ``[keep, candidates]``: filters, a `BestOf`, which chooses by its scorer
            too, or names of scorers. Rows of scorers that rest on one of theirs are marked.
        keep_images: how many pictures of each arm to keep for looking at.
        progress: show a progress bar an arm.

    Raises:
        PromptError: for fewer than two prompts, or one string in place of a list.
        InvalidValueError: without scorers or candidates, for scorers of one name, for diversity of a single draw, or
            for a guardrail that watches no row.
        ScoringError: if a scorer raises, or gives no finite number, for some pictures. All others are drawn and scored
            first, and the comparison of those is in the error. A scorer that fails on all of the first pictures raises
            what it raises, at once.
        ContractError: if a synthesizer or scorer returns something its seam does not allow.
        NonFiniteError: if a score is NaN or infinite, naming the prompt.

    >>> import artaug as aa
    >>> from PIL import Image
    >>> class Grey(aa.Synthesizer):
    ...     def __init__(self, light):
    ...         self.light = light
    ...     def synthesize(self, plan, *, seed):
    ...         return Image.new("L", (8, 8), self.light + seed % 16)
    >>> class Light(aa.Scorer):
    ...     def score(self, image, prompt):
    ...         return image.getpixel((0, 0)) / 255
    >>> comparison = aa.compare(Grey(51), {"lit": Grey(102)}, ["a harbour", "a hill"], scorers=[Light()], progress=False)
    >>> row = comparison.row("Light", "lit")
    >>> round(row.delta, 3), row.win_rate, row.n
    (0.2, 1.0, 2)
    """
    check(candidates, prompts, scorers)
    chosen_by, ledger = names_of(filtered_by), ScoringLog()
    seeds = tuple(picture_seeds(seed, len(prompts) * max(images_per_prompt, 0)))
    studio = Evaluator(tuple(prompts), seeds, tuple(scorers), diversity, batch_size, keep_images)
    studio.check_guardrails(guardrails)
    before = studio.draw(base, "base", ledger=ledger, progress=progress)
    after = {name: studio.draw(each, name, ledger=ledger, progress=progress) for name, each in candidates.items()}
    if ledger.failures and not studio.enough(before, after):
        raise ledger.error(None) from ledger.raised[0]
    comparison = Comparison(
        rows=rows_of(studio, before, after, seed=seed, filtered_by=chosen_by),
        prompts=studio.prompts,
        seeds=seeds,
        base=before,
        candidates=MappingProxyType(after),
        guardrails=tuple(guardrails),
        failures=tuple(ledger.failures),
    )
    if ledger.failures:
        raise ledger.error(comparison) from ledger.raised[0]
    return comparison
