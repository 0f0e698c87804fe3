"""Edit plans: draw, let a multimodal model plan atomic edits, and edit the picture step by step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL.Image import Image

from artaug._internal.arguments import Faults, check_argument, check_count
from artaug._internal.progress_bar import ProgressBar
from artaug._internal.prompts import check_prompts
from artaug.critique import Abstention, Answer, Critic, Critique, run_critic
from artaug.plan import Plan, RegionPlanner, run_planner
from artaug.recipes.edits import EditPlanner
from artaug.run.checking import check_planner_guide
from artaug.run.chunk_run import Lanes
from artaug.run.flow import Steps, awaited, chunks_under_way, run_in_order
from artaug.scoring import Scorer, score_images
from artaug.synthesis import Synthesizer, attempt_seed, draw
from artaug.trajectories import Trajectory, Turn


def grape(
    prompts: Sequence[str],
    *,
    synthesizer: Synthesizer,
    plan_edits: Critic,
    planner: RegionPlanner = EditPlanner(),  # noqa: B008 - a frozen value
    scorer: Scorer | None = None,
    regenerations: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Iterator[Trajectory]:
    r"""Generate, plan edits, edit: one picture, one list of edits, and each of them in turn (GraPE, arXiv 2412.06089).

    *The paper's:* a multimodal model compares picture and prompt and writes atomic edits, an editing model makes them one after the
    other, and what cannot be saved is drawn again. *Ours:* edits may have a place: a critic with boxes and
    ``planner=OnCanvas(GreedyPlanner(), strength=..., masked=True)`` inpaint each where it belongs, by the model that draws; with a scorer, the
    best picture is kept; a reply that cannot be read is an abstention with its reason, where the paper's code takes it for "no edits";
    the message has no examples with pictures, of which the paper's has eight.

    Args:
        prompts: what to draw.
        synthesizer: draws the first picture and edits, such as an `EditingSynthesizer` of FLUX.1 and Kontext.
        plan_edits: its suggestions are the edits, in their order, such as ``ChatEdits(ServedChat(...))``. Where it abstains, another first
            picture is drawn.
        planner: makes the plan of each edit from the picture before and the one suggestion. An edit whose plan changes nothing is left out.
        scorer: of every picture with its prompt; the last picture is the trajectory's best if not given.
        regenerations: how often a first picture is drawn again at most.
        seed: of the run; each prompt and first picture gets a seed of its own from it.
        progress: show a progress bar.

    Returns:
        One trajectory for each prompt, in their order, drawn when it is asked for: the last first picture, and a turn for each edit.

    Raises:
        PromptError: if there are no prompts or one is blank.
        GuideError: if the planner makes regions and the synthesizer has no guide.
        ModelError: if the synthesizer cannot draw from the planner's canvas.
        InvalidValueError: if an argument is of another type or out of its range.

    >>> from artaug.recipes import ChatEdits, EditPlanner, grape
    >>> from artaug.testing import SwatchSynthesizer
    >>> edits = ChatEdits(lambda message, image: "Feedback:\n1. make the cone red\n2. add a ball")
    >>> (trajectory,) = grape(["a red cone"], synthesizer=SwatchSynthesizer(), plan_edits=edits, progress=False)
    >>> [turn.plan.prompt for turn in trajectory.turns]
    ['a red cone', 'make the cone red', 'add a ball']
    """
    faults = Faults("grape")
    with faults.collected():
        check_prompts(prompts)
    for name, value, of in (
        ("synthesizer", synthesizer, Synthesizer),
        ("plan_edits", plan_edits, Critic),
        ("planner", planner, RegionPlanner),
        ("progress", progress, bool),
    ):
        with faults.collected():
            check_argument("grape", name, value, of)
    with faults.collected():
        check_argument("grape", "scorer", scorer, Scorer, optional=True)
    for name, count in (("regenerations", regenerations), ("seed", seed)):
        with faults.collected():
            check_count("grape", name, count, least=0)
    with faults.collected():
        check_planner_guide(planner, synthesizer)
    faults.raise_any()
    graped = _Grape(synthesizer, plan_edits, planner, scorer)
    seeds = [
        [
            attempt_seed(seed, round_number=1, prompt_index=index, candidate=number)
            for number in range(1 + regenerations)
        ]
        for index in range(len(prompts))
    ]
    return graped.trajectories(prompts, seeds, show=progress)


@dataclass(frozen=True)
class _Grape:
    """What all prompts share."""

    synthesizer: Synthesizer
    plan_edits: Critic
    planner: RegionPlanner
    scorer: Scorer | None

    def trajectories(
        self, prompts: Sequence[str], seeds: Sequence[Sequence[int]], *, show: bool
    ) -> Iterator[Trajectory]:
        drawing, asking = self.synthesizer.max_concurrency, self.plan_edits.max_concurrency
        depth = chunks_under_way(drawing=drawing, asking=asking, writes_behind=False)
        with (
            Lanes.opened(self.synthesizer, self.plan_edits) as lanes,
            ProgressBar("grape", total=len(prompts), unit="prompt", show=show) as bar,
        ):
            tasks = (self._steps(prompt, mine, lanes) for prompt, mine in zip(prompts, seeds, strict=True))
            for trajectory in run_in_order(tasks, depth=depth, poll=lambda: None):
                bar.advance()
                yield trajectory

    def _steps(self, prompt: str, seeds: Sequence[int], lanes: Lanes) -> Steps[Trajectory]:
        """One prompt: a first picture that can be edited, and its edits."""
        for seed in seeds[:-1]:
            image, answer = yield from self._first(prompt, seed, lanes)
            if isinstance(answer, Critique):
                break
        else:
            seed = seeds[-1]
            image, answer = yield from self._first(prompt, seed, lanes)
        turns = [self._turn(prompt, Plan(prompt), image, answer)]
        suggestions = answer.suggestions if isinstance(answer, Critique) else ()
        for suggestion in suggestions:
            plan = run_planner(self.planner, prompt, Critique((suggestion,)), image=image)
            if plan == Plan(prompt):
                continue
            (image,) = yield from awaited(lanes.draw, _drawn, self.synthesizer, plan, seed)
            turns.append(self._turn(prompt, plan, image, None))
        reason = f"{len(turns) - 1} of {len(suggestions)} edits made" if suggestions else "nothing is to be edited"
        if isinstance(answer, Abstention):
            reason = f"no edits were planned for {len(seeds)} first pictures, of the last: {answer.reason}"
        return Trajectory(prompt=prompt, turns=tuple(turns), seed=seed, stop_reason=reason)

    def _first(self, prompt: str, seed: int, lanes: Lanes) -> Steps[tuple[Image, Answer]]:
        """A first picture, and its edits."""
        (image,) = yield from awaited(lanes.draw, _drawn, self.synthesizer, Plan(prompt), seed)
        (answer,) = yield from awaited(lanes.critique, run_critic, self.plan_edits, [image], [prompt])
        return image, answer

    def _turn(self, prompt: str, plan: Plan, image: Image, answer: Answer | None) -> Turn:
        score = None if self.scorer is None else score_images(self.scorer, [image], [prompt])[0]
        return Turn(plan=plan, image=image, critique=answer, score=score)


def _drawn(synthesizer: Synthesizer, plan: Plan, seed: int) -> list[Image]:
    return draw(synthesizer, [plan], seeds=[seed])
