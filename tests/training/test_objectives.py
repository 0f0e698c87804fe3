"""Objectives against references of a few lines, and the courses they prescribe."""

import pytest
import torch

from artaug.errors import InvalidValueError
from artaug.training import (
    Course,
    EpsilonPrediction,
    FlowMatching,
    Objective,
    PairBatch,
    PairedDifference,
    Stage,
    SupervisedFineTuning,
    TwoStage,
    VPrediction,
)
from artaug.training.adapters import adapted


def batch_of(model, pairs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    before = model.encode_images([pair.before for pair in pairs])
    return PairBatch(
        before=before.float(),
        after=model.encode_images([pair.after for pair in pairs]).float(),
        conditioning=model.encode_prompts([pair.prompt for pair in pairs]),
        noise=torch.randn(before.shape, generator=generator),
        sigmas=torch.rand(len(pairs), generator=generator),
    )


def student_of(model):
    return adapted(model, rank=4, targets="blocks", generator=torch.Generator().manual_seed(0))


def disturb(student):
    """Give a fresh LoRA an effect, so that student and teacher differ."""
    generator = torch.Generator().manual_seed(1)
    for factor in student.parameters():
        factor.data += 0.1 * torch.randn(factor.shape, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("noising", [FlowMatching(), EpsilonPrediction(), VPrediction()], ids=repr)
def test_the_difference_of_nothing_is_nothing(make_model, pair_of, noising, dtype):
    model = make_model(noising=noising, dtype=dtype)
    batch = batch_of(model, [pair_of(1, changed=False), pair_of(2, changed=False)])
    with student_of(model) as student:
        loss = PairedDifference().loss(student, batch)
        loss.backward()
        assert loss.item() == 0.0
        assert all(factor.grad.count_nonzero() == 0 for factor in student.parameters())


def test_a_changed_pair_has_a_loss_and_a_gradient(tiny_model, two_pairs):
    with student_of(tiny_model) as student:
        loss = PairedDifference().loss(student, batch_of(tiny_model, two_pairs))
        loss.backward()
        assert loss.item() > 0.01
        assert any(factor.grad.count_nonzero() for factor in student.parameters())


def test_paired_difference_is_what_the_formula_says(tiny_model, two_pairs):
    batch = batch_of(tiny_model, two_pairs)
    sigma = batch.sigmas[:, None, None, None]
    noisy_before = (1 - sigma) * batch.before + sigma * batch.noise
    noisy_after = (1 - sigma) * batch.after + sigma * batch.noise
    with torch.no_grad():
        teacher = tiny_model.module.eval()(noisy_before, batch.sigmas, batch.conditioning["embeds"])
    with student_of(tiny_model) as student:
        disturb(student)
        learned = tiny_model.module(noisy_after, batch.sigmas, batch.conditioning["embeds"])
        expected = ((learned - (teacher - (batch.after - batch.before))) ** 2).mean()
        assert PairedDifference().loss(student, batch).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("objective", [SupervisedFineTuning(), TwoStage()], ids=repr)
def test_fine_tuning_is_what_the_formula_says(tiny_model, two_pairs, objective):
    batch = batch_of(tiny_model, two_pairs)
    sigma = batch.sigmas[:, None, None, None]
    with student_of(tiny_model) as student:
        disturb(student)
        noisy = (1 - sigma) * batch.after + sigma * batch.noise
        learned = tiny_model.module(noisy, batch.sigmas, batch.conditioning["embeds"])
        expected = ((learned - (batch.noise - batch.after)) ** 2).mean()
        assert objective.loss(student, batch).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_copying_stage_fine_tunes_on_the_pictures_before(tiny_model, two_pairs):
    batch = batch_of(tiny_model, two_pairs)
    mirrored = PairBatch(
        before=batch.after, after=batch.before, conditioning=batch.conditioning, noise=batch.noise, sigmas=batch.sigmas
    )
    copying, _ = TwoStage().course(2).stages
    with student_of(tiny_model) as student:
        assert torch.equal(copying.loss(student, batch), SupervisedFineTuning().loss(student, mirrored))


def test_the_teacher_is_the_model_without_the_lora(tiny_model, two_pairs):
    batch = batch_of(tiny_model, two_pairs)
    plain = tiny_model.module.eval()(batch.before, batch.sigmas, batch.conditioning["embeds"])
    with student_of(tiny_model) as student:
        disturb(student)
        asked = (batch.before, batch.sigmas, batch.conditioning)
        assert torch.equal(student.teacher(*asked), plain)
        assert not student.teacher(*asked).requires_grad
        assert not torch.equal(student.predict(*asked), plain)
        assert student.predict(*asked).requires_grad


def test_an_objective_of_ones_own_is_one_method(tiny_model, two_pairs):
    class Pull(Objective):
        def loss(self, model, batch):
            return model.predict(batch.after, batch.sigmas, batch.conditioning).square().mean()

    with student_of(tiny_model) as student:
        assert Pull().loss(student, batch_of(tiny_model, two_pairs)).requires_grad
    assert Pull().course(3).groups == ((0, 1, 2),)


@pytest.mark.parametrize("objective", [PairedDifference(), SupervisedFineTuning(), TwoStage(per_pair=False)], ids=repr)
def test_pairs_are_learned_together_unless_asked_otherwise(objective):
    assert objective.course(3).groups == ((0, 1, 2),)


def test_the_papers_recipe_learns_every_pair_alone_in_two_stages():
    course = TwoStage(copying=0.25).course(3)
    assert course.groups == ((0,), (1,), (2,))
    assert [stage.share for stage in course.stages] == [0.25, 0.75]


@pytest.mark.parametrize("copying", [0.0, 1.0, -1.0, float("nan")])
def test_two_stages_need_steps_for_both(copying):
    with pytest.raises(InvalidValueError, match="above 0 and below 1"):
        TwoStage(copying=copying)


@pytest.mark.parametrize(("groups", "shares"), [((), (1.0,)), (((),), (1.0,)), (((0,),), ()), (((0,),), (0.0,))])
def test_a_course_without_work_is_refused(groups, shares):
    with pytest.raises(InvalidValueError, match="a Course needs at least one group"):
        Course(groups, tuple(Stage(PairedDifference().loss, share) for share in shares))
