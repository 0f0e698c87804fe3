"""What was mended and what was left out while a reply was read, so that nothing happens in silence."""

from dataclasses import dataclass, field

_NAMED = 8


class Unusable(Exception):  # noqa: N818  # no error: it is why one suggestion of a reply cannot be used
    """One suggestion cannot be used; the message says why."""


@dataclass(frozen=True)
class Repairs:
    """A list that grows, with the suggestions each entry concerns."""

    mended: dict[str, list[int]] = field(default_factory=dict)
    dropped: dict[str, list[int]] = field(default_factory=dict)

    def mend(self, how: str, number: int | None = None) -> None:
        """Note what was done, to suggestion ``number`` (counted from 1) or to the reply."""
        concerned = self.mended.setdefault(how, [])
        if number is not None and number not in concerned[-1:]:
            concerned.append(number)

    def drop(self, why: str, number: int) -> None:
        """Note why suggestion ``number`` was left out."""
        self.dropped.setdefault(why, []).append(number)

    def sentences(self) -> tuple[str, ...]:
        """What was mended, then what was left out."""
        mended = (f"{how} ({_suggestions(whose)})" if whose else how for how, whose in self.mended.items())
        dropped = (f"left out {_suggestions(whose)}: {why}" for why, whose in self.dropped.items())
        return *mended, *dropped

    def reasons(self) -> str:
        """Why suggestions were left out, in one line."""
        return "; ".join(f"{why} ({_suggestions(whose)})" for why, whose in self.dropped.items())


def _suggestions(numbers: list[int]) -> str:
    named = ", ".join(map(str, numbers[:_NAMED]))
    more = f" and {len(numbers) - _NAMED:,} more" if len(numbers) > _NAMED else ""
    return f"suggestion{'s' if len(numbers) > 1 else ''} {named}{more}"
