"""Judges by rule, whose answers are known."""

from dataclasses import dataclass, field

import numpy as np

import artaug as aa


@dataclass(frozen=True)
class Lighter(aa.PairwiseJudge):
    """Prefers the lighter picture; equal ones tie. ``bias`` leans to the picture that is shown first."""

    bias: float = 0.0
    silent: frozenset[str] = frozenset()
    """Prompts about which it has no answer."""
    broken: frozenset[str] = frozenset()
    """Prompts on which it raises."""
    asked: list[str] = field(default_factory=list, repr=False, compare=False)

    def prefer(self, first, second, prompt):
        self.asked.append(prompt)
        if prompt in self.silent:
            return aa.Abstention(f"the reply 'both!' to {prompt!r} names no picture")
        if prompt in self.broken:
            raise KeyError(prompt)
        difference = light(first) - light(second)
        return float(np.clip(0.5 + self.bias + 0.5 * np.sign(difference), 0, 1))


def light(image):
    """The mean of a picture's luma, in [0, 1]."""
    return float(np.asarray(image.convert("L"), dtype=float).mean() / 255)
