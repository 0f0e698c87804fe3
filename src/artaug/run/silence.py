"""A critic that stays away: how long it has had transient faults only, and the error that ends the run."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from artaug.critique import Abstention, Answer, Critic
from artaug.errors import CriticError

_MAX_SILENCE_S, _MANY_PICTURES = 600.0, 8
"""A critic that has not answered for so long, at so many pictures in a row, stops the run: the prompts to come would all be
drawn for nothing."""


@dataclass
class Silence:
    """How long, and at how many pictures in a row, a critic has had transient faults only."""

    since_s: float = 0.0
    pictures: int = 0
    reason: str = ""

    def note(self, answers: Sequence[Answer], *, start_s: float) -> None:
        """Note the answers of a call that began at ``start_s``."""
        faults = [answer.reason for answer in answers if isinstance(answer, Abstention) and answer.transient]
        if len(faults) < len(answers):
            self.pictures = 0
            return
        if not faults:
            return
        if not self.pictures:
            self.since_s = start_s
        self.pictures += len(faults)
        self.reason = faults[-1]

    @property
    def is_long(self) -> bool:
        """Whether the critic, or its server, is probably down: one picture alone may be what it fails at."""
        return self.pictures >= _MANY_PICTURES and time.monotonic() - self.since_s >= _MAX_SILENCE_S

    def error(self, critic: Critic) -> CriticError:
        """The error that ends the run."""
        return CriticError(
            f"{type(critic).__name__} has not answered for {(time.monotonic() - self.since_s) / 60:.0f} minutes, at "
            f"{self.pictures} pictures in a row; the last time, {self.reason}. Make sure that its server runs, then run the "
            "same call to go on: what is in the run's store, or in the folder of artaug.critics.Cached, is not asked again."
        )
