"""The check at the door: whatever is wrong with the arguments of a run is said before the first picture, all at once."""

from dataclasses import dataclass

import pytest

import artaug as aa
from artaug import playground
from artaug.critics import PhotometricCritic
from artaug.diffusion import DiffusersSynthesizer
from artaug.scorers import Chroma
from artaug.testing import FixedCritic, SwatchSynthesizer

PROMPTS = playground.prompts(4, seed=0)
HELD_OUT = [prompt for prompt in playground.prompts(40, seed=1) if prompt not in PROMPTS][:6]


def trainer(**options):
    return aa.DifferentialLoRATrainer(**{"rank": 2, "steps": 8, "batch_size": 2, **options})


@pytest.fixture(scope="module")
def synthesizer():
    return playground.synthesizer(guide=aa.RegionalAttention())


@pytest.fixture
def drawn(monkeypatch):
    """All prompts of the pictures that were drawn."""
    prompts = []

    def counting(_self, plans, **_seeds):
        prompts.extend(plan.prompt for plan in plans)
        raise AssertionError("a picture was asked for")

    monkeypatch.setattr(DiffusersSynthesizer, "synthesize_batch", counting)
    return prompts


class NoNumber(aa.Scorer):
    def score(self, image, prompt):
        return None


class RunsOut(aa.Scorer):
    def score(self, image, prompt):
        raise RuntimeError("no such layer")


class NaN(aa.Scorer):
    def score(self, image, prompt):
        return float("nan")


class HasNoModel(aa.Synthesizer):
    def synthesize(self, plan, *, seed):
        raise AssertionError(plan, seed)


class LearnsNothing(HasNoModel):
    """Lends a model, and cannot draw with what was learned."""

    fingerprint = "a fake"

    def training(self):
        raise AssertionError


class NoVerdict(aa.PairFilter):
    def judge(self, pair):
        return True


@dataclass
class AnswersText(aa.Critic):
    asked: int = 0

    def critique(self, image, prompt):
        self.asked += 1
        return "too dark"


SHARED = [
    (
        {"synthesizer": DiffusersSynthesizer},
        aa.InvalidValueError,
        "synthesizer=.*received the class DiffusersSynthesizer",
    ),
    ({"synthesizer": "FLUX.1-dev"}, aa.InvalidValueError, "synthesizer='FLUX.1-dev'.*DiffusersSynthesizer"),
    ({"critic": PhotometricCritic}, aa.InvalidValueError, r"critic=.*Make one of the class: PhotometricCritic\(...\)"),
    ({"critic": lambda *_: None}, aa.InvalidValueError, "critic=.*an instance of artaug.Critic"),
    ({"planner": aa.GreedyPlanner}, aa.InvalidValueError, "planner=.*the class GreedyPlanner"),
    ({"planner": None}, aa.InvalidValueError, "planner=None.*received None"),
    ({"keep": Chroma()}, aa.InvalidValueError, r"keep=Chroma.*artaug.Gain\(scorer"),
    ({"keep": aa.Gain}, aa.InvalidValueError, r"keep=.*the class Gain"),
    ({"keep": lambda _: True}, aa.InvalidValueError, "keep=.*received a function"),
    ({"keep": [aa.Gain(Chroma())]}, aa.InvalidValueError, "keep=.*received a list"),
    ({"keep": aa.Gain(NoNumber())}, aa.ContractError, "NoNumber.score_batch returned None"),
    ({"keep": ~aa.Floor(NaN(), 0) | aa.Gain(Chroma())}, aa.NonFiniteError, "NaN.score_batch returned nan"),
    ({"keep": aa.Gain(RunsOut())}, aa.ScoringError, "'RunsOut' raised RuntimeError: no such layer"),
    ({"keep": NoVerdict()}, aa.ContractError, "judge_batch returned bool True"),
    ({"candidates": 4}, aa.InvalidValueError, r"candidates=4.*BestOf\(4"),
    ({"candidates": aa.BestOf(2, by=NaN())}, aa.NonFiniteError, "NaN.score_batch returned nan"),
    ({"seed": None}, aa.InvalidValueError, "seed=None.*whole number of at least 0"),
    ({"seed": -1}, aa.InvalidValueError, "seed=-1"),
    ({"seed": 0.5}, aa.InvalidValueError, "seed=0.5"),
    ({"batch_size": 0}, aa.InvalidValueError, "batch_size=0"),
    ({"batch_size": 2.0}, aa.InvalidValueError, "batch_size=2.0.*received a float"),
    ({"batch_size": True}, aa.InvalidValueError, "batch_size=True"),
    ({"check": "all"}, aa.InvalidValueError, "check='all'.*'everything'"),
    ({"check": "everything", "critic": AnswersText()}, aa.ContractError, "AnswersText.critique_batch returned str"),
    ({"prompts": "a red cone"}, aa.PromptError, "received one string"),
    ({"prompts": []}, aa.PromptError, "no prompts"),
    ({"prompts": ["a red cone", None]}, aa.PromptError, "prompts\\[1\\] is None"),
    ({"prompts": (prompt for prompt in PROMPTS)}, aa.PromptError, r"received generator.*list\(prompts\)"),
    ({"prompts": dict.fromkeys(PROMPTS)}, aa.PromptError, "received dict"),
]

LEARNING = [
    ({"synthesizer": HasNoModel()}, aa.ModelError, "HasNoModel has no model to train"),
    ({"synthesizer": LearnsNothing()}, aa.ModelError, "LearnsNothing cannot draw with the LoRA"),
    ({"trainer": None}, aa.InvalidValueError, "trainer=None"),
    ({"trainer": aa.DifferentialLoRATrainer}, aa.InvalidValueError, "trainer=.*the class"),
    ({"trainer": trainer(targets="nope")}, aa.LoRAMismatchError, "the targets 'nope' select none"),
    ({"trainer": trainer(steps=1, objective=aa.TwoStage())}, aa.InvalidValueError, "steps=1 are too few"),
    ({"trainer": trainer(steps=7, objective=aa.TwoStage(per_pair=True))}, aa.InvalidValueError, "steps=7 are too few"),
    (
        {"trainer": trainer(objective=aa.PairedDifference(weighting=aa.MinSNR()))},
        aa.ModelError,
        "MinSNR",
    ),
    ({"fuser": aa.ConcatFuser}, aa.InvalidValueError, r"fuser=.*ConcatFuser\(...\)"),
    ({"fuser": None}, aa.InvalidValueError, "fuser=None"),
    ({"rounds": 0}, aa.InvalidValueError, "rounds=0"),
    ({"rounds": 1.5}, aa.InvalidValueError, "rounds=1.5"),
    ({"rounds": "3"}, aa.InvalidValueError, "rounds='3'"),
    ({"stop": Chroma()}, aa.InvalidValueError, "stop=Chroma.*StopRule"),
    ({"stop": aa.StopRule(NaN(), HELD_OUT)}, aa.NonFiniteError, "NaN.score_batch returned nan"),
    ({"stop": aa.StopRule(Chroma(), [*HELD_OUT, PROMPTS[0]])}, aa.PromptError, "StopRule has 1 prompts"),
    ({"validation": 100}, aa.InvalidValueError, "validation=100"),
    ({"validation": aa.Validation(scorer=NoNumber(), prompts=HELD_OUT)}, aa.ContractError, "NoNumber.score_batch"),
    ({"validation": aa.Validation(scorer=Chroma(), prompts=PROMPTS)}, aa.PromptError, "Validation has 4 prompts"),
    ({"checkpoints": "runs/first"}, aa.InvalidValueError, "checkpoints='runs/first'.*Checkpoints"),
]


def arguments(synthesizer, options):
    given = {
        "prompts": PROMPTS,
        "synthesizer": synthesizer,
        "critic": PhotometricCritic(),
        "planner": aa.GreedyPlanner(),
        "keep": aa.Gain(Chroma(), at_least=-1),
        "seed": 0,
        **options,
    }
    return given.pop("prompts"), given


def names(table):
    return [f"{next(reversed(options))}-{number}" for number, (options, _, _) in enumerate(table)]


@pytest.mark.parametrize(("options", "error", "text"), SHARED, ids=names(SHARED))
@pytest.mark.parametrize("verb", [aa.improve, aa.enhance], ids=["improve", "enhance"])
def test_a_wrong_argument_is_refused_before_the_first_picture(synthesizer, drawn, verb, options, error, text):
    prompts, given = arguments(synthesizer, options)
    learning = {} if verb is aa.improve else {"trainer": trainer(), "rounds": 1, "progress": False}
    with pytest.raises(error, match=text) as caught:
        verb(prompts, **given, **learning)  # improve refuses at once, not when it is iterated over
    assert type(caught.value) is error
    assert drawn == []


@pytest.mark.parametrize(("options", "error", "text"), LEARNING, ids=names(LEARNING))
def test_what_would_end_a_training_is_refused_before_the_first_picture(synthesizer, drawn, options, error, text):
    prompts, given = arguments(synthesizer, {"trainer": trainer(), "rounds": 1, "progress": False, **options})
    with pytest.raises(error, match=text) as caught:
        aa.enhance(prompts, **given)
    assert type(caught.value) is error
    assert drawn == []


def test_a_planner_that_makes_regions_needs_a_guide_and_a_prompt_rewriter_does_not(synthesizer, drawn):
    class Rewriter(aa.RegionPlanner):
        def plan(self, prompt, critique):
            return aa.Plan(f"{prompt}, vivid")

    plain = DiffusersSynthesizer(pipeline=synthesizer.pipeline, width=64, height=64, max_sequence_length=24)
    prompts, given = arguments(plain, {})
    with pytest.raises(
        aa.GuideError, match="GreedyPlanner makes plans with regions, and this DiffusersSynthesizer has no"
    ):
        aa.improve(prompts, **given)
    aa.improve(prompts, **{**given, "planner": Rewriter()})
    assert drawn == []


def test_a_folder_that_cannot_be_written_is_refused_and_one_that_can_is_not_made(synthesizer, drawn, tmp_path):
    (tmp_path / "file").write_text("in the way")
    prompts, given = arguments(synthesizer, {"trainer": trainer(), "progress": False, "rounds": 0})
    with pytest.raises(
        aa.InvalidValueError, match=r"2 things are wrong.*\n.*\n- the folder of checkpoints .* cannot be"
    ):
        aa.enhance(prompts, **given, checkpoints=aa.Checkpoints(folder=tmp_path / "file" / "below"))
    with pytest.raises(aa.InvalidValueError, match=r"enhance\(rounds=0\)"):
        aa.enhance(prompts, **given, checkpoints=aa.Checkpoints(folder=tmp_path / "new" / "below"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert drawn == []


def test_one_error_lists_all_that_is_wrong(synthesizer, drawn):
    wrong = {"trainer": trainer(targets="nope"), "fuser": aa.ConcatFuser, "keep": Chroma(), "rounds": 0, "seed": -1}
    prompts, given = arguments(synthesizer, wrong)
    with pytest.raises(aa.InvalidValueError) as caught:
        aa.enhance(prompts, **given)
    heading, *lines = str(caught.value).splitlines()
    assert heading == "enhance: 5 things are wrong, and nothing was begun:"
    assert [line.partition("=")[0] for line in lines[:-1]] == [
        "- enhance(keep",
        "- enhance(fuser",
        "- enhance(seed",
        "- enhance(rounds",
    ]
    assert "the targets 'nope' select none" in lines[-1]
    assert drawn == []


def test_by_default_no_critic_is_asked_and_with_arguments_alone_no_scorer_either():
    critic, heard = AnswersText(), []

    class Listening(aa.Scorer):
        def score(self, image, prompt):
            heard.append((image.size, prompt))
            return 0.0

    prompts, given = arguments(SwatchSynthesizer(), {"critic": critic, "keep": aa.Floor(Listening(), 0)})
    aa.improve(prompts, **given, check="arguments")
    assert (critic.asked, heard) == (0, [])
    aa.improve(prompts, **given)
    assert (critic.asked, heard) == (0, [((64, 64), PROMPTS[0])])


def test_a_filter_that_asks_a_person_shows_nobody_a_stand_in(tmp_path):
    keep = aa.ManualReview(tmp_path / "decisions.jsonl", prefilter=aa.Gain(Chroma()))
    prompts, given = arguments(SwatchSynthesizer(), {"keep": keep & ~aa.RecordedDecisions(tmp_path / "others.jsonl")})
    aa.improve(prompts, **given)
    assert list(tmp_path.iterdir()) == []


def test_the_check_leaves_the_model_as_it_was(synthesizer):
    module = synthesizer.pipeline.transformer
    before = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    trainer().check(synthesizer, pairs=4)
    assert {name: parameter.requires_grad for name, parameter in module.named_parameters()} == before
    assert "peft_config" not in vars(module)


def test_a_scorer_that_raises_at_the_door_says_where_it_was_asked():
    prompts, given = arguments(SwatchSynthesizer(), {"keep": aa.Gain(RunsOut())})
    with pytest.raises(aa.ScoringError) as caught:
        aa.improve(prompts, **given)
    assert "pass check='arguments'" in caught.value.__notes__[-1]


def test_the_right_arguments_are_let_through(synthesizer, drawn):
    prompts, given = arguments(synthesizer, {"critic": FixedCritic(aa.Critique())})
    aa.improve(prompts, **given, candidates=aa.BestOf(2, by=Chroma()), on_event=print, check="everything")
    assert drawn == []
