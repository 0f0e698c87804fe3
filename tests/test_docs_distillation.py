"""The losses of docs/family/distillation.md, compared with what their formulas give by hand. The page itself is executed with the docs."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from artaug.training import FlowMatching, PromptBatch
from support.fences import FENCE

PAGE = Path(__file__).parents[1] / "docs" / "family" / "distillation.md"


def definitions():
    """What the page imports and defines, without what it trains."""
    names = {"__name__": "docs"}
    for fence in FENCE.finditer(PAGE.read_text(encoding="utf-8")):
        tree = ast.parse(fence["code"])
        kept = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
        tree.body = [node for node in tree.body if isinstance(node, kept)]
        exec(compile(tree, str(PAGE), "exec"), names)
    return SimpleNamespace(**names)


DOCS = definitions()
SIGMAS = torch.tensor([0.3, 0.6, 0.9])


class Gaussians:
    """A student that draws N(mean, 1), and the exact clean estimates of a teacher of N(0, 1) and of a companion that knows it all."""

    noise_schedule = FlowMatching()

    def __init__(self, mean):
        self.mean = mean
        self.known = mean.detach()  # what the companion has learned is no function of the student

    def predict(self, noisy, sigmas, _conditioning):
        assert (sigmas == 1).all()
        return noisy - (self.mean + noisy)  # whose clean estimate is mean + noise

    def _velocity(self, noisy, sigmas, mean):
        alpha, sigma = 1 - sigmas[:, None], sigmas[:, None]
        clean = mean + alpha / (alpha**2 + sigma**2) * (noisy - alpha * mean)  # E[x | z] of a normal x
        return (noisy - clean) / sigma

    def teacher_predict(self, noisy, sigmas, _conditioning, *, with_gradient=False):
        return self._velocity(noisy if with_gradient else noisy.detach(), sigmas, 0.0)

    def companion_predict(self, noisy, sigmas, _conditioning):
        return self._velocity(noisy, sigmas, self.known)


def batch_of(sigma, rows=4000):
    generator = torch.Generator().manual_seed(0)
    noise, start = torch.randn(2, rows, 1, generator=generator, dtype=torch.float64)
    return PromptBatch(
        conditioning={}, noise=noise, sigmas=torch.full((rows,), sigma, dtype=torch.float64), extra_noise=(start,)
    )


def gradient_of(objective, sigma, mean=0.7):
    mean = torch.tensor(mean, dtype=torch.float64, requires_grad=True)
    objective.loss(Gaussians(mean), batch_of(sigma)).backward()
    return mean.grad.item()


@pytest.mark.parametrize("sigma", SIGMAS.tolist())
def test_swift_brush_has_the_difference_of_the_predicted_noises(sigma):
    # Predicted noises of N(0, 1) and N(m, 1) differ by the same at every z: s alpha m / (alpha^2 + s^2).
    expected = sigma * (1 - sigma) * 0.7 / ((1 - sigma) ** 2 + sigma**2)
    assert gradient_of(DOCS.SwiftBrush(), sigma) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("sigma", SIGMAS.tolist())
@pytest.mark.parametrize("constant", [0.1, 2.0])
def test_score_implicit_matching_has_the_gradient_of_its_distance(sigma, constant):
    # Clean estimates differ by y = m s^2 / (alpha^2 + s^2) at every z, so the distance is sqrt(y^2 + c^2) - c itself.
    ratio = sigma**2 / ((1 - sigma) ** 2 + sigma**2)
    mean = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    ((ratio * mean) ** 2 + constant**2).sqrt().backward()
    objective = DOCS.ScoreImplicitMatching(constant=constant)
    assert gradient_of(objective, sigma) == pytest.approx(mean.grad.item(), rel=1e-5)


@pytest.mark.parametrize(("h", "f"), [(lambda r: r / (1 + r), lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log())])
def test_the_weight_of_f_distill_is_that_of_jensen_and_shannon(h, f):
    ratios = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(f(ratios).sum(), ratios, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), ratios)
    torch.testing.assert_close(DOCS.FDistill().weights(ratios), ratios**2 * second)
    torch.testing.assert_close(DOCS.FDistill().weights(ratios), h(ratios))


def test_trajectory_matching_starts_each_row_where_its_stage_begins():
    objective, sigmas = DOCS.TrajectoryMatching(stages=2), torch.tensor([0.2, 0.8])
    start = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    calls = []

    def predict(noisy, levels, _conditioning):
        calls.append((noisy, levels))
        return torch.full_like(noisy, 0.5)

    model = SimpleNamespace(noise_schedule=FlowMatching(), predict=predict)
    drawn = objective.draw(model, PromptBatch(conditioning={}, noise=start, sigmas=sigmas, extra_noise=(start,)))
    noisy, levels = calls[-1]
    assert levels.tolist() == [0.5, 1.0]
    torch.testing.assert_close(noisy, torch.stack([start[0] - 0.25, start[1]]))
    torch.testing.assert_close(drawn, start - 0.5)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_trajectory_matching_moves_the_students_estimate_as_its_code_does(guidance_scale):
    objective = DOCS.TrajectoryMatching(guidance_scale=guidance_scale)
    generator = torch.Generator().manual_seed(0)
    noise, start, prompt, negative, fake = torch.randn(5, 3, 4, generator=generator)
    student = torch.zeros(3, 4, requires_grad=True)
    model = SimpleNamespace(
        noise_schedule=FlowMatching(),
        predict=lambda noisy, _sigmas, _conditioning: student + 0 * noisy,
        teacher_predict=lambda _noisy, _sigmas, conditioning, **_: conditioning["predicted"],
        companion_predict=lambda _noisy, _sigmas, _conditioning: fake,
    )
    batch = PromptBatch(
        conditioning={"predicted": prompt},
        noise=noise,
        sigmas=SIGMAS,
        extra_noise=(start,),
        negative=None if objective.negative_prompt is None else {"predicted": negative},
    )
    loss, s = objective.loss(model, batch), SIGMAS[:, None]
    # x0 = z - s v, so differences of clean estimates are those of velocities times -s.
    move = -s * (prompt - fake) - (guidance_scale - 1) * s * (prompt - negative)
    torch.testing.assert_close(loss, torch.nn.functional.huber_loss(torch.zeros(3, 4), move))
