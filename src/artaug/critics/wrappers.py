"""Critics around other critics: an ensemble that votes, a cache on disk, and retries after abstentions."""

import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, final

from PIL.Image import Image

from artaug._internal.annotations import checked
from artaug._internal.digests import digest
from artaug._internal.images import rgb_parts
from artaug._internal.segments import read_segment, write_segment
from artaug._internal.transient import DEADLINE_S, TransientErrors, backoff_delay_s
from artaug._internal.values import value
from artaug.critique import Abstention, Answer, Critic, Critique, StreamingCritic, Suggestion, stream_critic
from artaug.errors import InvalidValueError, StorageError
from artaug.geometry import Box
from artaug.identity import identity_of

if TYPE_CHECKING:
    from torch import nn

_LOG = logging.getLogger(__name__)
_REMEDY = "The answers written before are complete: call again once the folder can be written to, or critique without a cache."


@checked
@final
@dataclass(frozen=True)
class Ensemble(StreamingCritic):
    """Runs several critics and suggests what at least ``min_votes`` of them suggest for the same place.

    Two suggestions are for the same place if the intersection over union of their boxes is at least ``iou_threshold``.
    The result has the median of the boxes' edges and the prompt of the first critic, in the order given, that made the
    suggestion, so list the best critic first. Suggestions are ordered by their votes. Critics that abstain do not count;
    if fewer than ``min_votes`` are left, the ensemble abstains with all their reasons.

    Raises:
        InvalidValueError: unless 1 <= min_votes <= the number of critics and 0 < iou_threshold <= 1.

    >>> import artaug as aa
    >>> from artaug.critics import Ensemble
    >>> from artaug.testing import FixedCritic
    >>> from PIL import Image
    >>> left, right = aa.Suggestion(aa.Box(0, 0, 0.5, 1), "a lamp"), aa.Suggestion(aa.Box(0.5, 0, 1, 1), "a door")
    >>> first, second = FixedCritic(aa.Critique((left, right))), FixedCritic(aa.Critique((left,)))
    >>> Ensemble((first, second), min_votes=2).critique(Image.new("RGB", (64, 64)), "a hall").suggestions == (left,)
    True
    """

    critics: tuple[Critic, ...]
    _: KW_ONLY
    min_votes: int = 2
    """The number of critics that must make a suggestion."""
    iou_threshold: float = 0.5
    """The smallest intersection over union, in (0, 1], of two boxes for the same place."""

    def __post_init__(self) -> None:
        if not (1 <= self.min_votes <= len(self.critics) and 0 < self.iou_threshold <= 1):
            raise InvalidValueError(
                f"Ensemble of {len(self.critics)} critics with min_votes={self.min_votes} and "
                f"iou_threshold={self.iou_threshold} could never suggest anything: need 1 <= min_votes <= the number of "
                "critics, and iou_threshold in (0, 1]."
            )

    @property
    def models(self) -> "Sequence[nn.Module]":
        return [model for critic in self.critics for model in critic.models]

    @property
    def max_concurrency(self) -> int:
        return min(critic.max_concurrency for critic in self.critics)

    def critique_stream(self, images: Sequence[Image], prompts: Sequence[str]) -> Iterator[tuple[int, Answer]]:
        """Criticise many pictures, one critic after the other, and give each answer when the last critic has answered."""
        votes: list[list[Answer]] = [[] for _ in prompts]  # by picture, in the order of the critics
        for critic in self.critics:
            for index, answer in stream_critic(critic, images, prompts):
                votes[index].append(answer)
                if len(votes[index]) == len(self.critics):
                    yield index, self._combine(votes[index])

    def _combine(self, answers: Sequence[Critique | Abstention]) -> Critique | Abstention:
        critiques = [answer for answer in answers if isinstance(answer, Critique)]
        if len(critiques) < self.min_votes:
            reasons = "; ".join(answer.reason for answer in answers if isinstance(answer, Abstention))
            # With a vote of those that may answer later there could be enough.
            final = sum(isinstance(answer, Abstention) and not answer.transient for answer in answers)
            transient = len(answers) - final >= self.min_votes
            return Abstention(f"only {len(critiques)} of {len(answers)} critics could tell: {reasons}", transient)
        clusters: list[_Cluster] = []
        for critic_index, critique in enumerate(critiques):
            for suggestion in critique.suggestions:
                self._assign(clusters, suggestion, critic_index)
        agreed = [cluster for cluster in clusters if len(cluster.votes) >= self.min_votes]
        agreed.sort(key=lambda cluster: -len(cluster.votes))
        summary = " ".join(critique.summary for critique in critiques if critique.summary)
        repairs = tuple(repair for critique in critiques for repair in critique.repairs)
        return Critique(tuple(cluster.suggestion() for cluster in agreed), summary, repairs)

    def _assign(self, clusters: "list[_Cluster]", suggestion: Suggestion, critic_index: int) -> None:
        """Add a suggestion to the cluster it overlaps most, among those without a vote of its critic, or to a new one."""
        open_clusters = [cluster for cluster in clusters if critic_index not in cluster.votes]
        best = max(open_clusters, key=lambda cluster: cluster.first.box.iou(suggestion.box), default=None)
        if best is not None and best.first.box.iou(suggestion.box) >= self.iou_threshold:
            best.votes[critic_index] = suggestion
        else:
            clusters.append(_Cluster(suggestion, {critic_index: suggestion}))


@dataclass(frozen=True)
class _Cluster:
    """The suggestions of several critics for the same place."""

    first: Suggestion
    votes: dict[int, Suggestion] = field(default_factory=dict)
    """By the index of the critic."""

    def suggestion(self) -> Suggestion:
        boxes = [vote.box for vote in self.votes.values()]
        edges = (statistics.median(getattr(box, edge) for box in boxes) for edge in ("left", "top", "right", "bottom"))
        reasons = dict.fromkeys(vote.reason for vote in self.votes.values() if vote.reason)
        return Suggestion(Box(*edges), self.first.prompt, "; ".join(reasons))


@value
class _CacheEntry:
    """The content of a file of the cache."""

    prompt: str
    answer: Critique | Abstention


@checked
@final
@dataclass(frozen=True)
class Cached(StreamingCritic):
    """Keeps a critic's answers in a folder, so that no picture is criticised twice.

    Each answer is written as soon as the critic has it: if a later one of the batch fails, those before it are kept.

    The file name is a digest of the picture's pixels, the prompt and the critic's identity, so another prompt, picture
    or critic is another entry. A file is written completely or not at all. A file that cannot be read is logged as a
    warning, and its picture is criticised again. Several processes may share the folder.

    Raises:
        InvalidValueError: if nothing but its address in memory distinguishes the critic, or something in it.
    """

    critic: Critic
    _: KW_ONLY
    folder: Path = field(repr=False)
    """The folder of the answers; created when the first one is written."""
    identity: str = ""
    """What distinguishes this critic from others, such as the model's name, revision and prompt; by default all that it is
    made of, see the page on runs."""
    cache_abstentions: bool = False
    """Whether to keep abstentions too, except transient ones, which may succeed the next time."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        self._critic_identity  # noqa: B018 - refuses now what has none

    @property
    def models(self) -> "Sequence[nn.Module]":
        return self.critic.models

    @property
    def max_concurrency(self) -> int:
        return self.critic.max_concurrency

    def critique_stream(self, images: Sequence[Image], prompts: Sequence[str]) -> Iterator[tuple[int, Answer]]:
        # By the path of an entry: the indices of its question, which may occur twice in a batch but is asked once.
        indices: dict[Path, list[int]] = {}
        for index, question in enumerate(zip(images, prompts, strict=True)):
            indices.setdefault(self._entry_path(*question), []).append(index)
        missing: list[Path] = []
        for path, same in indices.items():
            stored = _read_answer(path)
            if stored is not None and self._cacheable(stored):
                yield from ((index, stored) for index in same)
            else:
                missing.append(path)
        first = [indices[path][0] for path in missing]
        for position, answer in stream_critic(self.critic, [images[i] for i in first], [prompts[i] for i in first]):
            path, index = missing[position], first[position]
            if self._cacheable(answer):
                write_segment(path, _CacheEntry(prompts[index], answer), what="the critic's answer", remedy=_REMEDY)
            yield from ((index, answer) for index in indices[path])

    @cached_property
    def _critic_identity(self) -> str:
        if self.identity:
            return self.identity
        return digest(*(f"{name}={text}" for name, text in sorted(identity_of(self.critic, "critic").items())))

    def _cacheable(self, answer: Answer) -> bool:
        return isinstance(answer, Critique) or (self.cache_abstentions and not answer.transient)

    def _entry_path(self, image: Image, prompt: str) -> Path:
        # Of the pixels that critics see: a file's mode and palette do not count, and what they hide does not.
        name = digest(self._critic_identity, prompt, *rgb_parts(image))
        return self.folder / name[:2] / f"{name[2:]}.json"


def _read_answer(path: Path) -> Critique | Abstention | None:
    """The answer in a file; None if there is no such file, or it holds no answer."""
    try:
        return read_segment(
            path, _CacheEntry, what="answer of a critic", remedy="The picture is criticised again."
        ).answer
    except FileNotFoundError:
        return None
    except StorageError as error:
        _LOG.warning("%s", error)
        return None


@checked
@final
@dataclass(frozen=True)
class Retried(StreamingCritic):
    """Runs a critic again where it abstained or failed for a while; only the pictures without a critique.

    After an abstention it is run at most ``max_retries`` times more, without a wait, since its answers may vary. After a
    transient fault (an exception that ``transient`` lists, or an `Abstention` that is transient) it is run again with
    exponential backoff, at most 30 s between two tries, for ``retry_deadline_s``. A picture without a critique ends as an
    abstention with all the reasons. All other exceptions are raised at once. `OpenAICritic` has its own retries of
    transient faults.

    Raises:
        InvalidValueError: if ``max_retries`` is below 1 or ``retry_deadline_s`` below 0.

    >>> import artaug as aa
    >>> from artaug.critics import Retried
    >>> from artaug.testing import FixedCritic
    >>> from PIL import Image
    >>> moody = FixedCritic(aa.Abstention("no JSON"))
    >>> Retried(moody, max_retries=1).critique(Image.new("RGB", (64, 64)), "a hall")
    Abstention(reason='asked 2 times: no JSON')
    """

    critic: Critic
    _: KW_ONLY
    max_retries: int = 2
    """The largest number of further tries after abstentions that are not transient."""
    retry_deadline_s: float = field(default=DEADLINE_S, repr=False)
    """After a transient fault, no further try starts this many seconds after the critic last answered to anything."""
    transient: TransientErrors = field(default=TransientErrors(), repr=False)
    """Which exceptions of the critic are transient."""

    def __post_init__(self) -> None:
        if self.max_retries < 1:
            raise InvalidValueError(f"Retried(max_retries={self.max_retries}) would never try again: need at least 1.")
        if not self.retry_deadline_s >= 0:
            raise InvalidValueError(
                f"Retried(retry_deadline_s={self.retry_deadline_s}): need a time of at least 0 seconds."
            )

    @property
    def models(self) -> "Sequence[nn.Module]":
        return self.critic.models

    @property
    def max_concurrency(self) -> int:
        return self.critic.max_concurrency

    def critique_stream(self, images: Sequence[Image], prompts: Sequence[str]) -> Iterator[tuple[int, Answer]]:
        history: dict[int, list[Abstention]] = {index: [] for index in range(len(prompts))}  # without a critique
        silent_since, silent_tries = time.monotonic(), 0
        while history:
            pending, silent = list(history), True
            questions = [images[i] for i in pending], [prompts[i] for i in pending]
            for position, answer in stream_critic(self.critic, *questions, transient=self.transient):
                index = pending[position]
                if isinstance(answer, Critique):
                    del history[index]
                    yield index, answer
                else:
                    history[index].append(answer)
                silent = silent and isinstance(answer, Abstention) and answer.transient
            now = time.monotonic()
            silent_since, silent_tries = (silent_since, silent_tries + 1) if silent else (now, 0)
            delay_s = backoff_delay_s(silent_tries + 1)
            in_time = now - silent_since + delay_s <= self.retry_deadline_s
            for index in [index for index, tries in history.items() if not self._may_retry(tries, in_time=in_time)]:
                yield index, _last_of(history.pop(index))
            if any(tries[-1].transient for tries in history.values()):
                time.sleep(delay_s)

    def _may_retry(self, tries: Sequence[Abstention], *, in_time: bool) -> bool:
        return in_time if tries[-1].transient else sum(not answer.transient for answer in tries) <= self.max_retries


def _last_of(tries: Sequence[Abstention]) -> Abstention:
    """The last of several abstentions from one picture, with the reasons of all."""
    if len(tries) == 1:
        return tries[0]
    reasons = "; ".join(dict.fromkeys(answer.reason for answer in tries))
    return Abstention(f"asked {len(tries)} times: {reasons}", tries[-1].transient)
