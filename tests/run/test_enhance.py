"""Rounds on a tiny real FLUX: what they learn, when they stop, and what their result records."""

import inspect
import itertools
import signal
from dataclasses import dataclass, field

import pytest
import torch

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer
from artaug.scorers import Chroma, Exposure
from artaug.testing import FixedCritic, FixedFilter, SwatchSynthesizer
from artaug.training import TrainingResult
from support.tiny_flux import TINY_SIZE, tiny_flux

ADVICE = FixedCritic(aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a bright window"),)))
PROMPTS = ["a kitchen", "a harbour", "a garden"]
HELD_OUT = [f"held-out picture {number}" for number in range(6)]
TRAINER = aa.DifferentialLoRATrainer(rank=2, steps=2, batch_size=2, learning_rate=1e-2)


@dataclass
class ScriptedScorer(aa.Scorer):
    """Scores each picture by the next number of a list."""

    numbers: list[float]

    def score(self, image, prompt):
        return self.numbers.pop(0)


@dataclass
class NeverDraws(aa.Synthesizer):
    """Lends its model, and draws nothing."""

    model: DiffusersSynthesizer
    fingerprint = "a fake"

    def synthesize(self, plan, *, seed):
        raise AssertionError(plan, seed)

    def with_lora(self, lora, *, scale=1.0):
        raise AssertionError(lora)

    def training(self):
        return self.model.training()


@pytest.fixture(scope="module")
def flux():
    return DiffusersSynthesizer(
        pipeline=tiny_flux(),
        guide=aa.OutputMix(),
        width=TINY_SIZE,
        height=TINY_SIZE,
        steps=2,
        max_sequence_length=32,
    )


def enhanced(synthesizer, *, prompts=PROMPTS, critic=ADVICE, keep=None, rounds=2, **options):
    return aa.enhance(
        prompts,
        synthesizer=synthesizer,
        critic=critic,
        planner=aa.GreedyPlanner(),
        keep=FixedFilter(keep=True) if keep is None else keep,
        rounds=rounds,
        batch_size=2,
        # Scripted scorers may not be heard before the run.
        **{"trainer": TRAINER, "seed": 0, "progress": False, "check": "arguments", **options},
    )


def delta(lora, layer):
    return lora.layers[layer].delta()


def test_the_result_is_the_sum_of_what_the_rounds_learned(flux):
    result = enhanced(flux)

    first, second = result.rounds
    assert result.stop_reason == "all 2 rounds ran"
    assert result.lora is second.lora
    for name in result.lora.layers:
        both = delta(first.training.lora, name) + delta(second.training.lora, name)
        torch.testing.assert_close(delta(result.lora, name), both, atol=1e-6, rtol=0)


def test_the_same_arguments_give_the_same_lora_and_another_seed_another(flux):
    first, again, other = enhanced(flux, rounds=1), enhanced(flux, rounds=1), enhanced(flux, rounds=1, seed=1)
    for name in first.lora.layers:
        assert torch.equal(first.lora.layers[name].down, again.lora.layers[name].down)
        assert torch.equal(first.lora.layers[name].up, again.lora.layers[name].up)
    assert any(not torch.equal(first.lora.layers[name].up, other.lora.layers[name].up) for name in first.lora.layers)


def test_a_round_draws_with_what_the_rounds_before_have_learned(flux):
    first, second, third = enhanced(flux, rounds=3).rounds
    pair = second.attempts[0].pair
    assert pair.before.tobytes() != flux.synthesize(aa.Plan(pair.prompt), seed=pair.seed).tobytes()
    for before, after in ((first, second), (second, third)):
        pairs = [attempt.pair for attempt in after.attempts[:2]]
        expected = flux.with_lora(before.lora).synthesize_batch(
            [aa.Plan(pair.prompt) for pair in pairs], seeds=[pair.seed for pair in pairs]
        )
        assert pairs[0].before.tobytes() == expected[0].tobytes()
    assert {attempt.pair.seed for attempt in first.attempts}.isdisjoint(
        attempt.pair.seed for attempt in second.attempts
    )


def test_the_base_model_is_bitwise_what_it_was(flux):
    transformer = flux.pipeline.transformer
    weights = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    picture = flux.synthesize(aa.Plan("a kitchen"), seed=0).tobytes()

    enhanced(flux)

    assert transformer.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in transformer.state_dict().items())
    assert flux.synthesize(aa.Plan("a kitchen"), seed=0).tobytes() == picture


def test_every_stage_is_timed_and_every_prompt_counted(flux):
    keep = FixedFilter(keep=True)
    result = enhanced(flux, keep=keep, rounds=1, stop=aa.StopRule(ScriptedScorer([0.0] * 12), HELD_OUT))
    (only,) = result.rounds
    assert set(only.seconds) == {"draw", "critique", "redraw", "judge", "train", "combine", "measure"}
    assert min(only.seconds.values()) > 0
    summary = result.summary()
    assert summary["prompts"] == {"total": 3, "kept": 3, "dropped": 0, "skipped": 0, "skipped_because": {}}
    assert summary["rounds"][0]["pairs"] == 3
    assert summary["rounds"][0]["steps"] == 2


# A stop rule with six prompts scores six pictures of the base, then six after each round.
@pytest.mark.parametrize(
    ("after", "accepted"),
    [
        ([1.0, 1.1, 1.0, 1.2, 1.0, 0.9], True),
        ([0.0] * 6, False),
        ([-1.0] * 6, False),
        ([1, -1, 1, 1, -1, 1], False),
        # The whole interval lies above zero, and the p-value is 4 / 64: a comparison's verdict would not call it a gain.
        ([1.0, 1.1, 1.0, 1.2, 1.0, -0.05], False),
    ],
    ids=["all better", "no change", "all worse", "not settled", "not significant"],
)
def test_a_round_counts_only_if_a_verdict_would_call_it_a_gain(flux, after, accepted):
    result = enhanced(flux, rounds=1, stop=aa.StopRule(ScriptedScorer([0.0] * 6 + list(after)), HELD_OUT))
    (only,) = result.rounds
    assert only.accepted is accepted is (only.gain.significant and only.gain.direction > 0)
    if not accepted:
        assert result.stop_reason == "round 1 did not help on held-out prompts"
        with pytest.raises(aa.NothingToLearnError, match="no round helped"):
            _ = result.lora


def test_a_last_round_that_did_not_help_is_left_out_of_the_result(flux):
    scores = [0] * 6 + [1] * 12
    result = enhanced(flux, rounds=3, stop=aa.StopRule(ScriptedScorer(scores), HELD_OUT))
    assert [finished.accepted for finished in result.rounds] == [True, False]
    assert result.lora is result.rounds[0].lora
    assert result.stop_reason == "round 2 did not help on held-out prompts"


@pytest.mark.parametrize(
    "prompts", [HELD_OUT[:5], [*HELD_OUT[:5], HELD_OUT[0]], [*HELD_OUT[:5], f" {HELD_OUT[0].upper()}. "]], ids=str
)
def test_a_stop_rule_says_how_many_different_prompts_it_needs(prompts):
    with pytest.raises(aa.PromptError, match="received 5 different prompts and needs at least 6"):
        aa.StopRule(ScriptedScorer([]), prompts)
    with pytest.raises(aa.PromptError, match=r"Put it in a list: .'a hill'."):
        aa.StopRule(ScriptedScorer([]), "a hill")
    with pytest.raises(aa.PromptError, match="prompts\\[1\\] is ' '"):
        aa.StopRule(ScriptedScorer([]), ["a hill", " "])


@pytest.mark.parametrize("same", ["a kitchen", "A  Kitchen.", "\uff21 kitchen"])  # the last has a full-width letter
def test_held_out_prompts_that_are_training_prompts_are_refused_by_name_before_anything_is_drawn(flux, same):
    stop = aa.StopRule(ScriptedScorer([]), [*HELD_OUT, same])
    validation = aa.Validation(scorer=ScriptedScorer([]), prompts=["a moor", same])
    with pytest.raises(aa.PromptError, match=f"StopRule has 1 prompts that are training prompts: {same!r}"):
        enhanced(NeverDraws(flux), stop=stop)
    with pytest.raises(aa.PromptError, match=f"Validation has 1 prompts that are training prompts: {same!r}"):
        enhanced(NeverDraws(flux), validation=validation)
    with pytest.raises(aa.PromptError, match="StopRule has 1 prompts that are the Validation's too: 'A MOOR'"):
        enhanced(
            NeverDraws(flux),
            stop=aa.StopRule(ScriptedScorer([]), [*HELD_OUT, "A MOOR"]),
            validation=aa.Validation(scorer=ScriptedScorer([]), prompts=["a moor"]),
        )


@pytest.fixture
def drawn(monkeypatch):
    """Every picture that a model draws during the test: its prompt, seed and number of LoRAs."""
    drawn = []
    synthesize = DiffusersSynthesizer.synthesize_batch

    def recording(self, plans, *, seeds):
        drawn.extend((plan.prompt, seed, len(self.loras)) for plan, seed in zip(plans, seeds, strict=True))
        return synthesize(self, plans, seeds=seeds)

    monkeypatch.setattr(DiffusersSynthesizer, "synthesize_batch", recording)
    return drawn


def test_held_out_pictures_have_seeds_that_no_training_picture_has(flux, drawn):
    stop = aa.StopRule(ScriptedScorer([0.0] * 6 + [1.0] * 6 + [2.0] * 6), HELD_OUT)
    rounds = enhanced(flux, stop=stop).rounds
    learned, measured = (
        {seed for prompt, seed, _ in drawn if (prompt in HELD_OUT) is held_out} for held_out in (False, True)
    )
    assert (len(rounds), len(learned), len(measured)) == (2, 2 * len(PROMPTS), len(HELD_OUT))
    assert learned.isdisjoint(measured)


@pytest.mark.parametrize("stored", [False, True], ids=["in memory", "store"])
def test_a_round_is_compared_with_what_the_round_before_has_drawn_and_scored(flux, drawn, tmp_path, stored):
    numbers = [0.0] * 6 + [1.0] * 6 + [3.0] * 6 + [7.0] * 6
    scorer = ScriptedScorer(numbers)
    scorer.identity = "scripted"
    result = enhanced(flux, rounds=3, stop=aa.StopRule(scorer, HELD_OUT), store=tmp_path / "run" if stored else None)

    assert numbers == []
    assert [finished.gain.delta for finished in result.rounds] == [1.0, 2.0, 4.0]
    assert sum(prompt in HELD_OUT for prompt, _, _ in drawn) == 4 * len(HELD_OUT)
    for before, after in itertools.pairwise(finished.comparison for finished in result.rounds):
        assert after.base == before.candidates["after"]
        assert after.seeds == before.seeds


def test_a_resumed_run_reads_the_held_out_pictures_of_the_round_before_and_judges_them_anew(flux, drawn, tmp_path):
    def run(scorer, rounds):
        return enhanced(
            flux,
            rounds=rounds,
            stop=aa.StopRule(scorer, HELD_OUT, at_least=-10),
            store=aa.Store(tmp_path / "run", allow={"rounds", "stop"}),
        )

    run(Exposure(), rounds=1)
    drawn.clear()
    _, second = run(Chroma(), rounds=2).rounds

    assert [count for prompt, _, count in drawn if prompt in HELD_OUT] == [1] * len(HELD_OUT)
    whole = enhanced(flux, rounds=2, stop=aa.StopRule(Chroma(), HELD_OUT, at_least=-10)).rounds[1]
    assert second.comparison.to_dict()["scores"] == whole.comparison.to_dict()["scores"]
    assert second.gain == whole.gain


@dataclass(frozen=True, kw_only=True)
class LearnsWhatIsMissing(aa.DifferentialLoRATrainer):
    """Learns exactly what is missing to a wanted update, as a fake that draws with a sum of LoRAs tells."""

    def check(self, synthesizer, *, pairs):
        """It has no use for a model."""

    def train(self, pairs, synthesizer, **_):
        left, values, right = torch.linalg.svd(WANTED - synthesizer.update())
        roots = values.sqrt()
        lora = aa.LoRA({"x": aa.LowRank(roots[:, None] * right, left * roots)})
        return TrainingResult(lora=lora, losses=(1.0,), pairs=len(pairs), steps=1, seconds=0.0)


@dataclass(frozen=True)
class SumOfLoRAs(SwatchSynthesizer):
    loras: tuple = ()
    fingerprint = "a fake"

    def with_lora(self, lora, *, scale=1.0):
        return SumOfLoRAs(loras=(*self.loras, lora.scaled(scale)))

    def training(self):
        raise AssertionError("the trainer is a fake")

    def update(self):
        return sum((delta(lora, "x") for lora in self.loras), torch.zeros(4, 4))


WANTED = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0]))


@pytest.mark.parametrize(
    ("fuser", "distance"),
    [
        (aa.ConcatFuser(), 0.0),
        (aa.SvdFuser(rank=2), 5**0.5),
        (aa.SvdFuser(rank=3), 1.0),
        (aa.SvdFuser(energy=0.95), 1.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("rounds", [1, 2, 3, 4])
def test_with_a_fuser_that_cuts_ranks_no_round_moves_away_from_what_is_wanted(fuser, distance, rounds):
    result = enhanced(SumOfLoRAs(), fuser=fuser, trainer=LearnsWhatIsMissing(), rounds=rounds)
    assert len(result.rounds) == rounds
    assert (delta(result.lora, "x") - WANTED).norm().item() == pytest.approx(distance, abs=1e-5)


def test_without_loss_the_lora_is_bitwise_the_sum_of_all_trainings(flux):
    rounds = enhanced(flux, rounds=3).rounds
    summed = aa.ConcatFuser().fuse([finished.training.lora for finished in rounds])
    for name, layer in summed.layers.items():
        assert torch.equal(rounds[-1].lora.layers[name].down, layer.down)
        assert torch.equal(rounds[-1].lora.layers[name].up, layer.up)


def test_a_first_round_without_pairs_reports_how_its_prompts_ended(flux):
    with pytest.raises(aa.NothingToLearnError, match=r"round 1 kept none of 3 prompts: 3 dropped, 0 skipped; most of"):
        enhanced(flux, keep=FixedFilter(keep=False))
    with pytest.raises(aa.NothingToLearnError, match="0 dropped, 3 skipped; most often because 'the critic abstained"):
        enhanced(flux, critic=FixedCritic(aa.Abstention("too dark")))


@dataclass(frozen=True)
class FaultsThese(aa.Critic):
    """Suggests a change to the given pictures only."""

    images: frozenset[bytes]

    def critique(self, image, prompt):
        return ADVICE.answer if image.tobytes() in self.images else aa.Critique()


def test_a_later_round_that_keeps_nothing_ends_the_loop_with_the_rounds_before(flux):
    first = enhanced(flux, rounds=1)
    critic = FaultsThese(frozenset(attempt.pair.before.tobytes() for attempt in first.rounds[0].attempts))
    result = enhanced(flux, critic=critic)
    assert len(result.rounds) == 1
    assert result.stop_reason.startswith("round 2 kept none of 3 prompts: 0 dropped, 3 skipped")
    assert result.lora is result.rounds[0].lora


@dataclass(frozen=True)
class Raises(aa.Critic):
    """Answers the first pictures and raises at the one after them."""

    after: int
    error: Exception
    asked: list = field(default_factory=list)

    def critique(self, image, prompt):
        self.asked.append(prompt)
        if len(self.asked) == self.after + 1:
            raise self.error
        return ADVICE.answer


def test_a_bug_in_round_two_carries_the_rounds_before(flux):
    with pytest.raises(aa.CriticError, match="Raises raised KeyError: 'boxes'") as caught:
        enhanced(flux, critic=Raises(4, KeyError("boxes")))
    carried = caught.value.result
    assert [finished.number for finished in carried.rounds] == [1]
    assert carried.stop_reason.startswith("round 2 stopped with CriticError: Raises raised KeyError")
    assert carried.lora is carried.rounds[0].lora


def test_a_timeout_in_round_two_loses_no_prompt_and_no_round(flux):
    result = enhanced(flux, critic=Raises(4, TimeoutError("read timed out")))
    assert [len(finished.attempts) for finished in result.rounds] == [3, 3]
    assert all(isinstance(attempt, aa.Kept) for finished in result.rounds for attempt in finished.attempts)


def test_a_synthesizer_without_a_model_to_train_is_refused_before_anything_is_drawn():
    class HasNoModel(aa.Synthesizer):
        def synthesize(self, plan, *, seed):
            raise AssertionError(plan, seed)

    with pytest.raises(aa.ModelError, match="HasNoModel has no model to train"):
        enhanced(HasNoModel())


def test_by_default_there_are_three_rounds_of_seed_0_in_chunks_of_eight_with_progress_bars():
    parameters = inspect.signature(aa.enhance).parameters
    defaults = [parameters[name].default for name in ("rounds", "seed", "batch_size", "progress", "fuser")]
    assert defaults == [3, 0, 8, True, aa.ConcatFuser()]


@pytest.mark.parametrize("progress", [False, True])
def test_progress_bars_are_shown_only_if_wanted(flux, capsys, progress):
    enhanced(flux, rounds=1, progress=progress)
    assert ("round 1/1: 3/3 prompts (100%)" in capsys.readouterr().err) is progress


@pytest.mark.parametrize(("at_least", "accepted"), [(0.5, True), (1.0, False), (-0.5, True)])
def test_the_whole_interval_has_to_exceed_the_gain_that_a_stop_rule_requires(flux, at_least, accepted):
    stop = aa.StopRule(ScriptedScorer([0.0] * 6 + [1.0] * 6), HELD_OUT, at_least=at_least)
    assert enhanced(flux, rounds=1, stop=stop).rounds[0].accepted is accepted


def test_zero_rounds_are_refused():
    with pytest.raises(aa.InvalidValueError, match=r"enhance\(rounds=0\): expected a whole number of at least 1"):
        enhanced(SwatchSynthesizer(), rounds=0)


def test_held_out_pictures_choose_what_a_round_has_learned(flux):
    results = []
    held_out = aa.Validation(
        scorer=ScriptedScorer([0.0] * 2 + [1.0, 1.0] + [2.0, 2.0]),
        prompts=HELD_OUT[:2],
        every=1,
        on_validation=results.append,
    )
    (only,) = enhanced(flux, rounds=1, validation=held_out).rounds
    assert [result.step for result in results] == [1, 2]
    assert only.training.validations == tuple(results)
    assert only.training.best_validation.step == 2


def test_a_killed_run_goes_on_where_it_was(flux, tmp_path):
    uninterrupted = enhanced(flux)
    checkpoints = aa.Checkpoints(folder=tmp_path, every=1)

    def interrupt(event):
        if isinstance(event, aa.ProgressEvent) and (event.round_number, event.stage) == (2, "critique"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        enhanced(flux, checkpoints=checkpoints, on_event=interrupt)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("round-1/*")}
    again = enhanced(flux, checkpoints=checkpoints)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert again.lora.digest == uninterrupted.lora.digest
    with pytest.raises(aa.StorageError, match="seed: 0 then, 1 now"):
        enhanced(flux, checkpoints=checkpoints, seed=1)


def test_events_say_which_round_they_are_of_and_count_steps_over_all_rounds(flux, tmp_path, capsys):
    options = {"store": tmp_path / "run", "progress": True}
    events = []
    enhanced(flux, on_event=events.append, **options)
    steps = [event for event in events if isinstance(event, aa.StepEvent)]
    rounds = [event for event in events if isinstance(event, aa.RoundEvent)]
    assert [(event.round_number, event.step, event.run_step) for event in steps] == [
        (1, 1, 1),
        (1, 2, 2),
        (2, 1, 3),
        (2, 2, 4),
    ]
    assert [(event.round.number, event.run_step, event.resumed) for event in rounds] == [(1, 2, False), (2, 4, False)]
    capsys.readouterr()

    again = []
    enhanced(flux, on_event=again.append, **options)

    assert [(event.round.number, event.run_step, event.resumed) for event in again] == [(1, 2, True), (2, 4, True)]
    assert capsys.readouterr().err.splitlines() == [
        f"round {number}/2: 3/3 prompts (100%), kept 3 of 3 (100%), read from the store" for number in (1, 2)
    ]


def test_on_step_gets_the_steps_with_their_round_as_on_event_does(flux):
    events, steps = [], []
    enhanced(flux, rounds=1, on_event=events.append, on_step=steps.append)
    assert steps == [event for event in events if isinstance(event, aa.StepEvent)]
    assert steps[0].round_number == 1


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_first_interrupt_stops_at_a_safe_point_and_says_how_to_go_on(flux, tmp_path):
    uninterrupted = enhanced(flux)

    def interrupt(event):
        if isinstance(event, aa.ProgressEvent) and event.stage == "draw" and event.count:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="make the same call again to go on") as caught:
        enhanced(flux, store=tmp_path, on_event=interrupt)
    assert caught.value.result.rounds == ()
    assert list(tmp_path.glob("images/*/*.webp"))
    assert enhanced(flux, store=tmp_path).lora.digest == uninterrupted.lora.digest


def test_more_rounds_go_on_after_those_that_are_finished(flux, tmp_path):
    enhanced(flux, store=tmp_path, rounds=1)
    with pytest.raises(aa.StorageError, match="rounds: 1 then, 2 now"):
        enhanced(flux, store=tmp_path, rounds=2)
    longer = enhanced(flux, store=aa.Store(tmp_path, allow={"rounds"}), rounds=2)
    assert longer.lora.digest == enhanced(flux, rounds=2).lora.digest
