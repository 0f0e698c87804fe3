"""`refine`: draw, critique and draw again, in turns, until a picture is good enough or the turns cost too much."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path

import PIL.Image
from PIL.Image import Image

from artaug._internal.arguments import Faults, argument_error, check_argument, check_count
from artaug._internal.calls import call_part
from artaug._internal.contracts import check_result
from artaug._internal.progress_bar import ProgressBar
from artaug._internal.prompts import check_prompts
from artaug.canvas import Canvas
from artaug.critique import Abstention, Answer, Critic, Critique, run_critic
from artaug.image_files import ImageFile, ImageFolder
from artaug.placement import Placement, Resident
from artaug.plan import Plan, RegionPlanner, run_planner
from artaug.run.checking import check_planner_guide
from artaug.run.chunk_run import Lanes
from artaug.run.flow import Steps, awaited, chunks_under_way, run_in_order
from artaug.run.storage.cached_synthesizer import CachedSynthesizer
from artaug.run.turn_rules import Budget, TurnRule
from artaug.scoring import score_images
from artaug.synthesis import Synthesizer, attempt_seed, draw
from artaug.trajectories import Think, Thought, Trajectory, Turn


def refine(  # noqa: PLR0913 - one verb over many nouns, as `improve`
    prompt: str,
    *,
    synthesizer: Synthesizer,
    critic: Critic,
    planner: RegionPlanner,
    seed: int = 0,
    turns: int = 3,
    think: Think | None = None,
    stop: TurnRule | None = None,
    budget: Budget | None = None,
    placement: Placement = Resident(),  # noqa: B008 - a frozen value
    progress: bool = True,
) -> Trajectory:
    """Draw a prompt, and draw it again by what a critic says, in several turns at inference; nothing is learned.

    Every turn draws with the same seed. Its plan is made of the prompt and of everything that the critic has said of the pictures
    before, the newest first, so that what was put right stays so. A planner that starts from the picture before, such as `OnCanvas`,
    gets what was said of that picture alone. Turns end when the critic abstains, says nothing, or the plan changes nothing,
    with ``stop`` by the score of the pictures, with ``budget`` by what the next turn would cost, and after ``turns`` at the latest.
    One turn is plain drawing, bit for bit.

    Args:
        prompt: what to draw.
        synthesizer: draws every turn.
        critic: says what to improve; it is not asked about the last picture that is drawn. Where it has a fault that passes, the turns
            end: `artaug.critics.Retried` asks again.
        planner: makes the plan of the next turn.
        seed: of all pictures.
        turns: at most this many pictures.
        think: what is thought of the prompt before the first picture, and the plan that it gives; a plain picture if not given.
        stop: scores every picture; the trajectory's best is that with the highest score. The last turn if not given.
        budget: what the turns may cost.
        placement: where the models of synthesizer, critic and scorer are.
        progress: show a progress bar.

    Returns:
        The turns. A notebook shows them; `Trajectory.image` is the best picture, `Trajectory.pairs` gives what can be learned from.

    Raises:
        PromptError: if the prompt is blank or no text.
        GuideError: if the planner makes regions and the synthesizer has no guide.
        ModelError: if ``placement`` is to move a model that cannot be moved.
        InvalidValueError: if an argument is of another type or out of its range; with a line for each thing if several are
            wrong. Nothing is drawn then.
        ContractError: if the synthesizer, critic, planner, scorer or ``think`` returns something its seam does not allow.

    Example:
        >>> import artaug as aa
        >>> from artaug.testing import FixedCritic, SwatchSynthesizer
        >>> left = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a brightly lit window"),))
        >>> trajectory = aa.refine(
        ...     "a kitchen", synthesizer=SwatchSynthesizer(), critic=FixedCritic(left), planner=aa.GreedyPlanner(), progress=False
        ... )
        >>> len(trajectory.turns), trajectory.stop_reason
        (2, 'the plan of turn 3 changes nothing')
    """
    refiner = _Refiner(synthesizer, critic, planner, turns, think, stop, budget, placement)
    refiner.check("refine", [prompt], seed=seed, progress=progress)
    (trajectory,) = _refined(refiner, [(prompt, seed)], show=progress, unit="turn", total=turns)
    return trajectory


def refine_each(  # noqa: PLR0913 - one verb over many nouns, as `improve`
    prompts: Sequence[str],
    *,
    synthesizer: Synthesizer,
    critic: Critic,
    planner: RegionPlanner,
    seed: int = 0,
    turns: int = 3,
    think: Think | None = None,
    stop: TurnRule | None = None,
    budget: Budget | None = None,
    placement: Placement = Resident(),  # noqa: B008 - a frozen value
    folder: str | Path | None = None,
    progress: bool = True,
) -> Iterator[Trajectory]:
    """Refine many prompts, each on its own: with its seed, a prompt's trajectory is that of `refine`, bit for bit.

    Where synthesizer or critic compute elsewhere, as many prompts are under way as they take calls. The arguments that are not
    here are those of `refine`.

    Args:
        prompts: what to draw.
        synthesizer: see `refine`.
        critic: see `refine`.
        planner: see `refine`.
        seed: of the run; each prompt gets a seed of its own from it, see `artaug.synthesis.attempt_seed`.
        turns: at most this many pictures of a prompt.
        think: see `refine`.
        stop: see `refine`.
        budget: what the turns of one prompt may cost.
        placement: see `refine`.
        folder: keeps the pictures, so that the same call draws none twice, also after a stop; then a trajectory holds files. Wrap
            the critic in `artaug.critics.Cached` to keep its answers as well. Without it, pictures are in memory.
        progress: show a progress bar.

    Returns:
        An iterator over one trajectory for each prompt, in their order, drawn when it is asked for.

    Raises:
        PromptError: at once, if there are no prompts or one is blank.
        StorageError: if the folder cannot be written to.
        ArtAugError: see `refine`.

    >>> import artaug as aa
    >>> from artaug.testing import FixedCritic, SwatchSynthesizer
    >>> trajectories = aa.refine_each(
    ...     ["a kitchen", "a harbour"],
    ...     synthesizer=SwatchSynthesizer(),
    ...     critic=FixedCritic(aa.Abstention("it is too dark to tell")),
    ...     planner=aa.GreedyPlanner(),
    ...     progress=False,
    ... )
    >>> [trajectory.stop_reason for trajectory in trajectories]
    ['the critic abstained: it is too dark to tell', 'the critic abstained: it is too dark to tell']
    """
    refiner = _Refiner(synthesizer, critic, planner, turns, think, stop, budget, placement)
    refiner.check("refine_each", prompts, seed=seed, progress=progress)
    if folder is not None:
        check_argument("refine_each", "folder", folder, str if isinstance(folder, str) else PathLike)
        images = ImageFolder(Path(folder) / "images")
        cached = CachedSynthesizer(synthesizer, folder=Path(folder) / "drawings", images=images)
        refiner = replace(refiner, synthesizer=cached, images=images)
    seeded = [(prompt, attempt_seed(seed, round_number=1, prompt_index=index)) for index, prompt in enumerate(prompts)]
    return _refined(refiner, seeded, show=progress, unit="prompt", total=len(prompts))


def _refined(
    refiner: "_Refiner", seeded: Sequence[tuple[str, int]], *, show: bool, unit: str, total: int
) -> Iterator[Trajectory]:
    """The trajectory of each prompt and seed, as they are asked for."""
    drawing, asking = refiner.synthesizer.max_concurrency, refiner.critic.max_concurrency
    depth = min(chunks_under_way(drawing=drawing, asking=asking, writes_behind=False), len(seeded))
    with refiner.opened() as opened, ProgressBar("refine", total=total, unit=unit, show=show) as bar:
        advance_turn = bar.advance if unit == "turn" else lambda: None
        tasks = (opened.steps(prompt, own, advance_turn) for prompt, own in seeded)
        for trajectory in run_in_order(tasks, depth=depth, poll=lambda: None):
            if unit == "prompt":
                bar.advance()
            yield trajectory
        if unit == "turn":
            bar.note, bar.total = trajectory.stop_reason, bar.done  # fewer than there might have been
            bar.move_to(bar.done)


@dataclass(frozen=True)
class _Refiner:
    """What the turns of every prompt need."""

    synthesizer: Synthesizer
    critic: Critic
    planner: RegionPlanner
    turns: int
    think: Think | None
    stop: TurnRule | None
    budget: Budget | None
    placement: Placement
    images: ImageFolder | None = None
    lanes: Lanes = Lanes(None, None)  # noqa: RUF009 - a frozen value

    def check(self, owner: str, prompts: Sequence[str], *, seed: int, progress: bool) -> None:
        """Refuse what could not end well, with one error that lists all that is wrong."""
        faults = Faults(owner)
        with faults.collected():
            check_prompts(prompts)
        types: Sequence[tuple[str, object, type, bool]] = (
            ("synthesizer", self.synthesizer, Synthesizer, False),
            ("critic", self.critic, Critic, False),
            ("planner", self.planner, RegionPlanner, False),
            ("stop", self.stop, TurnRule, True),
            ("budget", self.budget, Budget, True),
            ("placement", self.placement, Placement, False),
            ("progress", progress, bool, False),
        )
        for name, value, of, optional in types:
            with faults.collected():
                check_argument(owner, name, value, of, optional=optional)
        for name, count, least in (("turns", self.turns, 1), ("seed", seed, 0)):
            with faults.collected():
                check_count(owner, name, count, least=least)
        with faults.collected():
            if self.think is not None and not callable(self.think):
                raise argument_error(
                    owner, "think", self.think, expected="a function from a prompt to an artaug.Thought"
                )
        with faults.collected():
            check_planner_guide(self.planner, self.synthesizer)
        faults.raise_any()
        self.placement.check(owner, {"synthesizer": self.synthesizer, "critic": self.critic, "stop": self._scorer})

    @cached_property
    def _canvas(self) -> Canvas | None:
        """What a further turn starts from, but for the picture; None if that is noise alone."""
        return self.planner.canvas_over(PIL.Image.new("RGB", self.synthesizer.picture_size))

    @property
    def _scorer(self) -> object:
        return None if self.stop is None else self.stop.scorer

    @contextmanager
    def opened(self) -> Iterator["_Refiner"]:
        """This, with threads for what computes elsewhere and models in their places, for a ``with`` block."""
        with ExitStack() as stack:
            placed = stack.enter_context(self.placement.opened(self.synthesizer, self.critic, self._scorer))
            lanes = stack.enter_context(Lanes.opened(self.synthesizer, self.critic))
            yield replace(self, placement=placed, lanes=lanes)

    def steps(self, prompt: str, seed: int, advance: Callable[[], None]) -> Steps[Trajectory]:
        """All turns of one prompt: a task of `artaug.run.flow`."""
        thought, done, reason = self._first_thought(prompt), list[Turn](), ""
        plan: Plan | None = thought.plan
        while plan is not None:
            image = yield from awaited(self.lanes.draw, self._draw, plan, seed)
            score = self._score(image, prompt)
            turn = Turn(plan=plan, image=self._kept(image), thought="" if done else thought.text, score=score)
            plan, reason = None, self._end([*done, turn])
            if not reason:
                answer = yield from awaited(self.lanes.critique, self._ask, image, prompt)
                turn = _with_critique(turn, answer)
                plan, reason = self._next(prompt, [*done, turn])
            done.append(turn)
            advance()
        return Trajectory(prompt=prompt, turns=tuple(done), seed=seed, stop_reason=reason)

    def _first_thought(self, prompt: str) -> Thought:
        think = self.think
        if think is None:
            return Thought(text="", plan=Plan(prompt))
        thought = call_part(lambda: think(prompt), owner="think", inputs=f"the prompt {prompt!r}")
        return check_result("think", "", thought, of=Thought, inputs=repr(prompt))

    def _draw(self, plan: Plan, seed: int) -> Image:
        with self.placement.stage(self.synthesizer):
            (image,) = draw(self.synthesizer, [plan], seeds=[seed])
        return image

    def _kept(self, image: Image) -> Image | ImageFile:
        return image if self.images is None else self.images.add(image)

    def _score(self, image: Image, prompt: str) -> float | None:
        if self.stop is None:
            return None
        with self.placement.stage(self.stop.scorer):
            (score,) = score_images(self.stop.scorer, [image], [prompt])
        return score

    def _ask(self, image: Image, prompt: str) -> Answer:
        with self.placement.stage(self.critic):
            (answer,) = run_critic(self.critic, [image], [prompt])
        return answer

    def _end(self, done: Sequence[Turn]) -> str:
        """Why the critic is not asked about the last picture; empty if it is."""
        scores = [turn.score for turn in done if turn.score is not None]
        if self.stop is not None and (reason := self.stop.end(scores)):
            return reason
        if len(done) >= self.turns:
            return f"all {self.turns} turns ran" if self.turns > 1 else "the one turn ran"
        asked = [*done[:-1], _with_critique(done[-1], Critique())]
        return self._too_dear(asked, Plan("", canvas=self._canvas))

    def _next(self, prompt: str, done: Sequence[Turn]) -> tuple[Plan | None, str]:
        """The plan of the next turn; without one, the reason."""
        answer, number = done[-1].critique, len(done) + 1
        if isinstance(answer, Abstention):
            return None, f"the critic abstained: {answer.reason}"
        if answer is not None and not answer.suggestions and not answer.summary.strip():
            return None, "the critic has nothing to improve"
        said = _all_so_far(done[-1:] if self._canvas is not None else done)
        plan = run_planner(self.planner, prompt, said, image=done[-1].reference)
        if self.images is not None:
            plan = plan.stored_in(self.images)
        if (same := next((turn for turn, one in enumerate(done, start=1) if one.plan == plan), 0)) != 0:
            what = "changes nothing" if same == number - 1 else f"is that of turn {same}"
            return None, f"the plan of turn {number} {what}"
        reason = self._too_dear(done, plan)
        return (None, reason) if reason else (plan, "")

    def _too_dear(self, done: Sequence[Turn], plan: Plan) -> str:
        """Whether the picture of a plan costs more than is left, in words; empty if not."""
        if self.budget is None:
            return ""
        spent = self.budget.cost(done)
        price = self.budget.price(plan) + self.budget.score * (self.stop is not None)
        if self.budget.allows(spent + price):
            return ""
        return f"turn {len(done) + 1} would cost {price:g} beside {spent:g}, with a budget of {self.budget.at_most:g}"


def _with_critique(turn: Turn, critique: Answer) -> Turn:
    return Turn(plan=turn.plan, image=turn.reference, thought=turn.thought, critique=critique, score=turn.score)


def _all_so_far(done: Sequence[Turn]) -> Critique:
    """Everything that the critic has said, the newest first; remarks on the whole picture are the newest alone."""
    critiques = [turn.critique for turn in reversed(done) if isinstance(turn.critique, Critique)]
    suggestions = dict.fromkeys(suggestion for critique in critiques for suggestion in critique.suggestions)
    return replace(critiques[0], suggestions=tuple(suggestions))
