"""`plan_run`: what a run will take, from a few prompts that go through its real stages."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from artaug._internal.arguments import argument_error, check_count
from artaug._internal.files import free_bytes
from artaug.critique import Critic
from artaug.filtering import BestOf, PairFilter
from artaug.lora.fusing import ConcatFuser, Fuser
from artaug.placement import Placement, Resident
from artaug.plan import RegionPlanner
from artaug.run.checking import Check, check_run
from artaug.run.events import OnEvent
from artaug.run.parts import LearningParts, LoopParts
from artaug.run.planning.extrapolation import Extrapolation
from artaug.run.planning.run_plan import RunPlan
from artaug.run.planning.sampling import Sampler
from artaug.run.session import check_store
from artaug.run.stop_rule import StopRule
from artaug.run.storage.store import Store
from artaug.synthesis import Synthesizer
from artaug.training import Checkpoints, DifferentialLoRATrainer, StepEvent, Validation


def plan_run(  # noqa: PLR0913 - the arguments of `enhance`, and how far to sample
    prompts: Sequence[str],
    *,
    synthesizer: Synthesizer,
    critic: Critic,
    planner: RegionPlanner,
    keep: PairFilter,
    trainer: DifferentialLoRATrainer,
    fuser: Fuser = ConcatFuser(),  # noqa: B008 - a frozen value
    rounds: int = 3,
    candidates: BestOf | None = None,
    validation: Validation | None = None,
    stop: StopRule | None = None,
    store: Store | str | Path | None = None,
    checkpoints: Checkpoints | None = None,
    seed: int = 0,
    batch_size: int = 8,
    chunk_size: int | None = None,
    placement: Placement = Resident(),  # noqa: B008 - a frozen value
    progress: bool = True,
    on_event: OnEvent | None = None,
    on_step: Callable[[StepEvent], None] | None = None,
    check: Check = "scorers",
    sample: int = 8,
    steps: int = 8,
    price_per_million_tokens: tuple[float, float] | None = None,
) -> RunPlan:
    """Say what `enhance` with the same arguments will take: hours, memory, tokens and disk, by stage.

    A few prompts of the run, drawn by its seed, go through the real stages: at least two chunks of them where ``sample``
    allows, after one more that warms up and is timed apart. Then a few training steps run on all pairs of the sample,
    kept or not. All of that is written to a temporary folder, which is removed, and nothing of it becomes part of the run.

    What a sample cannot show is taken as constant: the yield, which falls in later rounds as the model learns, and how
    a critic's server answers under the load of the hour. All rounds and all steps are counted, although a stop rule or a
    validation may end them before.

    Args:
        prompts: as in `enhance`, as are all arguments but the last three.
        synthesizer: see `enhance`.
        critic: see `enhance`. It is asked about the pictures of the sample, which may cost.
        planner: see `enhance`.
        keep: see `enhance`.
        trainer: see `enhance`.
        fuser: see `enhance`.
        rounds: see `enhance`.
        candidates: see `enhance`.
        validation: see `enhance`.
        stop: see `enhance`.
        store: of the run to come: checked, and asked how much room there is on its disk. Nothing is written to it.
        checkpoints: see `enhance`.
        seed: see `enhance`. The sample's pictures have other seeds than the run's.
        batch_size: see `enhance`.
        chunk_size: see `enhance`. The sample's chunks have as many prompts if it has twice as many, else half of it.
        placement: see `enhance`.
        progress: show a progress bar of the sample.
        on_event: checked, and not called: nothing of the sample is part of the run.
        on_step: as ``on_event``.
        check: see `enhance`.
        sample: prompts to time; more narrow the intervals.
        steps: of training to time. Objectives that need more get more.
        price_per_million_tokens: of the servers of critic, scorers and judges, for input and output. If theirs differ, leave
            it out, and multiply the tokens of the plan.

    Returns:
        The plan; ``print`` it, or `RunPlan.save` it for the report of the run.

    Raises:
        ArtAugError: as `enhance` before anything is drawn, and what the parts raise.
        InvalidValueError: for a ``sample`` or ``steps`` below 1, or prices that are not two numbers from 0 up.
    """
    parts = LoopParts(
        synthesizer=synthesizer,
        critic=critic,
        planner=planner,
        keep=keep,
        candidates=candidates,
        batch_size=batch_size,
        chunk_size=chunk_size,
        placement=placement,
    )
    learning = LearningParts(
        trainer=trainer,
        fuser=fuser,
        rounds=rounds,
        validation=validation,
        stop=stop,
        checkpoints=checkpoints,
        on_step=on_step,
    )
    check_run(
        "plan_run", prompts, parts, learning, seed=seed, store=None, on_event=on_event, progress=progress, check=check
    )
    for name, number in (("sample", sample), ("steps", steps)):
        check_count("plan_run", name, number)
    _check_prices(price_per_million_tokens)
    if store is None and checkpoints is not None:
        store = checkpoints.folder
    if store is not None:
        check_store(Store.of(store), "enhance", prompts, parts, learning, seed=seed)
    chosen = _choose(prompts, sample, seed=seed)
    chunk = min(parts.prompts_per_chunk, math.ceil(len(chosen) / 2))
    with (
        TemporaryDirectory(prefix="artaug-plan-", ignore_cleanup_errors=True) as folder,
        placement.opened(*parts.by_name().values(), *learning.by_name().values()) as opened,
    ):
        sampler = Sampler(
            replace(parts, placement=opened),
            learning,
            seed=seed,
            steps=steps,
            folder=Path(folder),
            progress=progress,
        )
        costs = sampler.measure(chosen, chunk=chunk)
    return Extrapolation(parts, learning, costs, prompts=len(prompts), stored=store is not None).plan(
        free_bytes=None if store is None else free_bytes(Path(Store.of(store).folder)), prices=price_per_million_tokens
    )


def _check_prices(prices: object) -> None:
    if prices is None:
        return
    is_legal = (
        isinstance(prices, tuple | list)
        and len(prices) == 2
        and all(isinstance(price, int | float) and 0 <= price < math.inf for price in prices)
    )
    if not is_legal:
        raise argument_error(
            "plan_run",
            "price_per_million_tokens",
            prices,
            expected="two numbers from 0 up, the prices of a million input and a million output tokens",
        )


def _choose(prompts: Sequence[str], count: int, *, seed: int) -> list[str]:
    """Prompts without replacement, in their order: the first ones may be unlike the rest."""
    chosen = np.random.default_rng(seed).choice(len(prompts), min(count, len(prompts)), replace=False)
    return [prompts[index] for index in sorted(chosen)]
