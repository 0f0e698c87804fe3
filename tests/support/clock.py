"""Time that passes while somebody sleeps, so that ten minutes of retries take none."""

from dataclasses import dataclass, field


@dataclass
class FakeTime:
    """Stands in for the module ``time`` in a module that waits."""

    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        """The time now."""
        return self.now

    def perf_counter(self) -> float:
        """The time now."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Note a sleep and move on."""
        self.slept.append(seconds)
        self.now += seconds
