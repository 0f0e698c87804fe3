"""Direct preference optimization: of each pair, after is preferred to before."""

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from artaug.errors import InvalidValueError
from artaug.training.noise_schedule import Latents
from artaug.training.objectives import Objective, PairBatch, Student, check_outside_weight, mean_squared_errors


@dataclass(frozen=True, kw_only=True)
class DirectPreference(Objective):
    """Learns to explain the picture after better, and the picture before worse, than the frozen model does.

    With ``L(model, x)`` the mean squared error of a model's prediction for the noisy picture ``x``, noise and level
    shared by both pictures::

        gain(x) = L(teacher, x) - L(student, x)
        loss    = -log sigmoid(beta / 2 * (gain(after) - gain(before)))
                  + anchor * beta / 2 * (|student - teacher|^2 at after + |student - teacher|^2 at before)

    The first line is Diffusion-DPO (arXiv 2311.12908, eq. 14) and, for flow models, Flow-DPO (arXiv 2501.13918) with a
    constant beta: if the probability that after is preferred is the sigmoid of a difference of rewards, the best policy
    within a KL distance of the teacher has ``beta log(student / teacher)`` as its reward, and the errors bound those
    logarithms. ``L`` is taken of whatever the model predicts: velocity, noise or v. A loss of log 2 is no preference,
    which is where every training starts.

    Nothing in it says how far to go: the error of before may grow without end. The anchor does. For a flow student that
    moves its prediction at both pictures by ``x`` times the difference ``d``, and a teacher that cannot tell them apart,
    the loss is ``-log sigmoid(beta m x) + anchor beta m x^2`` with ``m = mean(d^2)``, least where ``sigmoid(-beta m x) =
    2 anchor x``. At the defaults and ``m = 0.2``, usual for one prompt drawn twice from one seed, that is the edit
    itself, x = 1. So ``beta`` should be about ``4 / m``. The published 2000 to 5000 are for pictures that have nothing in
    common, and stop at a hundredth of an edit here; without an anchor, a small beta overshoots it.

    Raises:
        InvalidValueError: unless ``beta`` is above 0, ``anchor`` and ``outside`` at least 0, and all finite.
    """

    beta: float = 20.0
    """How much a difference of mean squared errors counts: the smaller, the further the LoRA may go."""
    anchor: float = 0.01
    """How strongly both predictions are held to the teacher's, in units of ``beta / 2``; everywhere in the picture."""
    outside_weight: float = 1.0
    """What an error outside the plan's regions counts for the preference, where one inside counts 1."""

    def __post_init__(self) -> None:
        check_outside_weight(self, self.outside_weight)
        if not (0 < self.beta < math.inf and 0 <= self.anchor < math.inf):
            raise InvalidValueError(
                f"DirectPreference(beta={self.beta}, anchor={self.anchor}): need a finite beta above 0 and a finite "
                "anchor of at least 0."
            )

    def loss(self, model: Student, batch: PairBatch) -> Tensor:
        won, held_after = self._gain(model, batch, batch.after)
        lost, held_before = self._gain(model, batch, batch.before)
        half = self.beta / 2
        return (half * self.anchor * (held_after + held_before) - logsigmoid(half * (won - lost))).mean()

    def _gain(self, model: Student, batch: PairBatch, clean: Latents) -> tuple[Tensor, Tensor]:
        """By how much the student's error is below the teacher's, and how far the two are apart: one number a row."""
        noisy = model.noise_schedule.add_noise(clean, batch.noise, batch.sigmas)
        target = model.noise_schedule.target(clean, batch.noise, batch.sigmas)
        teacher = model.teacher_predict(noisy, batch.sigmas, batch.conditioning)
        learned = model.predict(noisy, batch.sigmas, batch.conditioning)
        weights = batch.weights(self.outside_weight)
        gain = mean_squared_errors(teacher, target, weights=weights) - mean_squared_errors(
            learned, target, weights=weights
        )
        return gain, mean_squared_errors(learned, teacher)
