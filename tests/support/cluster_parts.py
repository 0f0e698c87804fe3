"""Parts that workers of a cluster build in tests: small, quick, and deadly where a test asks for it."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import artaug as aa
from artaug.testing import SwatchSynthesizer

ADVICE = aa.Critique((aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a bright window"),))


def note(folder, word):
    """Leave a file that the test counts."""
    (Path(folder) / f"{word}-{os.urandom(8).hex()}").touch()


def count(folder, word):
    """How many files were left."""
    return len(list(Path(folder).glob(f"{word}*")))


@dataclass(frozen=True)
class MortalSynthesizer(aa.Synthesizer):
    """Draws swatches; dies at a prompt that says so, always or once, or hangs."""

    folder: str

    def synthesize(self, plan, *, seed):
        return self.synthesize_batch([plan], seeds=[seed])[0]

    def synthesize_batch(self, plans, *, seeds):
        note(self.folder, f"call{len(plans)}")
        for plan in plans:
            deadly = plan.prompt.startswith("deadly") or (plan.prompt.startswith("brittle") and plan.regions)
            once = plan.prompt.startswith("once") and not count(self.folder, "death")
            if deadly or once:
                note(self.folder, "death")
                os.kill(os.getpid(), signal.SIGKILL)
            if plan.prompt.startswith("stuck"):
                note(self.folder, "stuck")
                time.sleep(3600)
            if plan.prompt.startswith("faulty"):
                raise ArithmeticError("no such colour")
            if plan.prompt.startswith("large") and len(plans) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return [SwatchSynthesizer().synthesize(plan, seed=seed) for plan, seed in zip(plans, seeds, strict=True)]


@dataclass(frozen=True)
class BuildsMortal:
    """Makes it and counts how often."""

    folder: str

    def __call__(self):
        note(self.folder, "load")
        return MortalSynthesizer(self.folder)


@dataclass(frozen=True)
class MortalCritic(aa.Critic):
    """Advises; dies at a prompt that says so."""

    def critique(self, image, prompt):
        if "poison" in prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        return ADVICE


@dataclass(frozen=True)
class MortalScorer(aa.Scorer):
    """Scores all alike; dies at a prompt that says so."""

    def score(self, image, prompt):
        if "poison" in prompt:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0.5


@dataclass(frozen=True)
class DiesWhenBuilt:
    folder: str

    def __call__(self):
        note(self.folder, "birth")
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class RaisesWhenBuilt:
    folder: str

    def __call__(self):
        note(self.folder, "birth")
        raise OSError("there is no such checkpoint")


@dataclass(frozen=True)
class BuildsOthers:
    """Makes another synthesizer in every process."""

    folder: str

    def __call__(self):
        note(self.folder, "other")
        return SwatchSynthesizer(width=64 + 16 * count(self.folder, "other"))
