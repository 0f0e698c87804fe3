"""Critics made of critics: several that must agree, one whose answers are kept on disk, one that is asked again."""

import json
import logging
import statistics
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

from PIL.Image import Image

from artaug._internal.digests import digest
from artaug._internal.files import atomic_write
from artaug._internal.values import from_json, to_json, value
from artaug.critique import Abstention, Critic, Critique, Suggestion, run_critic
from artaug.errors import InvalidValueError
from artaug.geometry import Box

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ensemble(Critic):
    """Asks several critics, and for what at least some of them ask at the same place.

    Two suggestions are for the same place if their boxes overlap (intersection over union) by at least ``overlap``.
    What is agreed on gets the median of the boxes' edges and the words of the first critic in the order given that
    asked for it, so name the best one first; what most critics ask for comes first. Critics that abstain do not count,
    and where fewer than ``agree`` are left the ensemble abstains with all their reasons.

    Raises:
        InvalidValueError: unless 1 <= agree <= the number of critics and 0 < overlap <= 1.

    >>> import artaug as aa
    >>> from artaug.critics import Ensemble
    >>> from artaug.testing import FixedCritic
    >>> from PIL import Image
    >>> left, right = aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a lamp"), aa.Suggestion(aa.Box(0.5, 0, 1, 1), "a door")
    >>> one, other = FixedCritic(aa.Critique((left, right))), FixedCritic(aa.Critique((left,)))
    >>> Ensemble((one, other), agree=2).critique(Image.new("RGB", (64, 64)), "a hall").suggestions == (left,)
    True
    """

    critics: tuple[Critic, ...]
    _: KW_ONLY
    agree: int = 2
    """At least so many critics ask for a change."""
    overlap: float = 0.5
    """At least so much intersection over union, in (0, 1], is the same place."""

    def __post_init__(self) -> None:
        if not (1 <= self.agree <= len(self.critics) and 0 < self.overlap <= 1):
            raise InvalidValueError(
                f"Ensemble of {len(self.critics)} critics with agree={self.agree} and overlap={self.overlap} cannot "
                "agree on anything: need 1 <= agree <= the number of critics, and overlap in (0, 1]."
            )

    def critique(self, image: Image, prompt: str) -> Critique | Abstention:
        return self.critique_batch([image], [prompt])[0]

    def critique_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[Critique | Abstention]:
        asked = [run_critic(critic, images, prompts) for critic in self.critics]
        return [self._agreed(answers) for answers in zip(*asked, strict=True)]

    def _agreed(self, answers: Sequence[Critique | Abstention]) -> Critique | Abstention:
        told = [answer for answer in answers if isinstance(answer, Critique)]
        if len(told) < self.agree:
            reasons = "; ".join(answer.reason for answer in answers if isinstance(answer, Abstention))
            return Abstention(f"only {len(told)} of {len(answers)} critics could tell: {reasons}")
        places: list[_Place] = []
        for number, critique in enumerate(told):
            for suggestion in critique.suggestions:
                self._join(places, suggestion, number)
        kept = sorted(
            (place for place in places if len(place.voices) >= self.agree), key=lambda place: -len(place.voices)
        )
        summary = " ".join(critique.summary for critique in told if critique.summary)
        repairs = tuple(repair for critique in told for repair in critique.repairs)
        return Critique(tuple(place.suggestion() for place in kept), summary, repairs)

    def _join(self, places: "list[_Place]", suggestion: Suggestion, critic: int) -> None:
        """Let a suggestion join the place it overlaps most with, unless the same critic has spoken for it already."""
        free = [place for place in places if critic not in place.voices]
        best = max(free, key=lambda place: place.first.box.iou(suggestion.box), default=None)
        if best is not None and best.first.box.iou(suggestion.box) >= self.overlap:
            best.voices[critic] = suggestion
        else:
            places.append(_Place(suggestion, {critic: suggestion}))


@dataclass(frozen=True)
class _Place:
    """A part of the picture, and what each critic that spoke of it said."""

    first: Suggestion
    voices: dict[int, Suggestion] = field(default_factory=dict)

    def suggestion(self) -> Suggestion:
        boxes = [voice.box for voice in self.voices.values()]
        edges = (statistics.median(getattr(box, edge) for box in boxes) for edge in ("left", "top", "right", "bottom"))
        reasons = dict.fromkeys(voice.reason for voice in self.voices.values() if voice.reason)
        return Suggestion(Box(*edges), self.first.prompt, "; ".join(reasons))


@value
class _Entry:
    """What a file of the cache holds."""

    prompt: str
    answer: Critique | Abstention


@dataclass(frozen=True)
class Cached(Critic):
    """Keeps a critic's answers in a folder, so that the same question is paid for once.

    An answer is found again by the picture's pixels, the prompt and the critic's identity: a digest of these is the
    file's name, so a changed prompt, picture or critic misses it. Files are written whole or not at all, and one that
    cannot be read is said (as a warning in the log), asked again and replaced. The folder may be shared by processes.

    Raises:
        InvalidValueError: if the critic has no identity of its own, because its repr is that of an object in memory.
    """

    critic: Critic
    _: KW_ONLY
    folder: Path
    """Where the answers are; made when the first one is written."""
    identity: str = ""
    """What tells this critic from others, such as the model's name, revision and prompt; its repr if not given."""
    abstentions: bool = False
    """Whether to keep abstentions too. A server that did not answer is one, and is worth another try next time."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        if not self.identity and " at 0x" in repr(self.critic):
            raise InvalidValueError(
                f"{self.critic!r} cannot be told from another {type(self.critic).__name__}: its repr changes from run to "
                "run. Make it a frozen dataclass, or pass identity='...' with all that its answers depend on."
            )

    def critique(self, image: Image, prompt: str) -> Critique | Abstention:
        return self.critique_batch([image], [prompt])[0]

    def critique_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[Critique | Abstention]:
        files = [self._file(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
        kept = {file: _kept(file) for file in dict.fromkeys(files)}
        answers = {file: answer if self._keeps(answer) else None for file, answer in kept.items()}
        missing = {file: number for number, file in enumerate(files) if answers[file] is None}
        if missing:
            asked = [images[number] for number in missing.values()], [prompts[number] for number in missing.values()]
            for (file, number), new in zip(missing.items(), run_critic(self.critic, *asked), strict=True):
                answers[file] = new
                if self._keeps(new):
                    _keep(file, _Entry(prompts[number], new))
        return [answer for file in files if (answer := answers[file]) is not None]

    def _keeps(self, answer: Critique | Abstention | None) -> bool:
        return self.abstentions or isinstance(answer, Critique)

    def _file(self, image: Image, prompt: str) -> Path:
        look = [image.mode, image.size, image.getpalette() if image.mode in {"P", "PA"} else None]
        question = json.dumps([self.identity or repr(self.critic), prompt, *look])
        name = digest(question, image.tobytes())
        return self.folder / name[:2] / f"{name[2:]}.json"


def _kept(file: Path) -> Critique | Abstention | None:
    """The answer in a file; None if there is no such file, or it holds none."""
    try:
        return from_json(_Entry, file.read_bytes()).answer
    except FileNotFoundError:
        return None
    except InvalidValueError as fault:
        _LOG.warning("%s holds no answer of a critic and is asked for again: %s", file, fault)
        return None


def _keep(file: Path, entry: _Entry) -> None:
    remedy = "The answers written before are complete: make room and call again, or critique without a cache."
    with atomic_write(file, what="the critic's answer", remedy=remedy) as partial:
        partial.write_text(to_json(entry), encoding="utf-8")


@dataclass(frozen=True)
class Retried(Critic):
    """Asks a critic again where it abstained, for critics that do not always answer alike.

    Only the pictures without an answer are asked about again, as one batch. If the last answer is an abstention too,
    all reasons are given. It does not wait between tries: a critic that calls a server has manners of its own.

    Raises:
        InvalidValueError: if ``times`` is below 1.
    """

    critic: Critic
    _: KW_ONLY
    times: int = 2
    """Asked at most so many times more."""

    def __post_init__(self) -> None:
        if self.times < 1:
            raise InvalidValueError(f"Retried(times={self.times}) asks no second time: need at least 1.")

    def critique(self, image: Image, prompt: str) -> Critique | Abstention:
        return self.critique_batch([image], [prompt])[0]

    def critique_batch(self, images: Sequence[Image], prompts: Sequence[str]) -> list[Critique | Abstention]:
        answers = run_critic(self.critic, images, prompts)
        reasons: dict[int, list[str]] = {
            number: [answer.reason] for number, answer in enumerate(answers) if isinstance(answer, Abstention)
        }
        for _ in range(self.times):
            open_ = [number for number in reasons if isinstance(answers[number], Abstention)]
            if not open_:
                break
            again = run_critic(self.critic, [images[number] for number in open_], [prompts[number] for number in open_])
            for number, answer in zip(open_, again, strict=True):
                answers[number] = answer
                if isinstance(answer, Abstention):
                    reasons[number].append(answer.reason)
        return [_all_reasons(answer, reasons.get(number, ())) for number, answer in enumerate(answers)]


def _all_reasons(answer: Critique | Abstention, reasons: Sequence[str]) -> Critique | Abstention:
    if isinstance(answer, Critique):
        return answer
    return Abstention(f"asked {len(reasons)} times: {'; '.join(dict.fromkeys(reasons))}")
