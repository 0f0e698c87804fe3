"""The folder of a run: what is in it, and the check that a call goes on with the run that began there.

::

    run.json                 every call that worked on this run: settings, versions, seeds
    images/ab/<digest>.webp  pictures, lossless, named by the SHA-256 of their pixels
    metadata.jsonl           the pairs, for people and for ``datasets.load_dataset("imagefolder", ...)``; derived
    latents/                 what the trainer encoded; can be deleted
    measure/                 drawing calls of held-out pictures; can be deleted
    round-1/
      round.json             how many prompts it has
      attempts/0-00000.json  a finished chunk: candidates, answers, plans, verdicts, drawing calls
      work/0-00001/          the chunk under way, one file a drawing call and an answer
      verdicts.json          of a filter that compares the pairs of a round
      comparison.json        the round against the one before on held-out prompts
      checkpoints-96/        of the training, while it goes
      result.safetensors     losses, gain, and the LoRAs of the round to the bit
      lora.safetensors       the LoRA of all rounds so far, for other programs

Every file appears whole or not at all, is written once, and holds a digest of its content.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import final

from artaug._internal.annotations import checked
from artaug._internal.arguments import check_argument
from artaug._internal.digests import digest
from artaug._internal.files import check_writable
from artaug._internal.segments import read_segment, write_segment
from artaug._internal.values import value
from artaug.errors import InvalidValueError, StorageError
from artaug.image_files import ImageFolder
from artaug.run.storage.provenance import installed_versions
from artaug.run.storage.round_folder import RoundFolder

_VERSION = 1
_MAX_LISTED = 12
"""Differences that an error lists."""
_FIXED = {
    "chunk_size": "a chunk is finished as it was begun; pass it by name to keep it where batch_size changes",
    "seed": "it decides every picture",
}
"""Settings that no name allows to differ, and why."""
_OWN = {"run.json", "images", "latents", "measure", "lock", "owner.json", "metadata.jsonl"}
"""What a folder may hold in which no run has begun: another program's files are left alone."""
_DIGEST = re.compile(r"[0-9a-f]{64}")
_REMEDY = "What the run has finished is complete: run the same call to go on once the folder can be written to."


@checked
@final
@dataclass(frozen=True)
class Store:
    """The folder that keeps a run of `improve` or `enhance`, so that the same call goes on where it stopped.

    A call whose arguments differ from those that began the run is refused, with the names of all that differs: settings of
    every part, their models and weights, prompts, versions of packages, threads. Names in ``allow`` may differ, for
    instance ``{"prompts"}`` to add prompts at the end of the list, ``{"rounds"}`` for more rounds, or ``{"critic"}``.

    >>> import artaug as aa
    >>> aa.Store("runs/first", allow={"prompts"})
    Store(folder='runs/first', allow={'prompts'}, take_over=False)
    """

    folder: str | Path
    """Made if it does not exist. Of a path alone, ``store="runs/first"`` is short for this."""
    _: KW_ONLY
    allow: Collection[str] = ()
    """Names, or beginnings of dotted names, of what may differ from the call before."""
    take_over: bool = False
    """Run although another process seems to hold the folder, which died on another machine."""

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str | Path):
            check_argument("Store", "folder", self.folder, Path)
        if isinstance(self.allow, str):
            raise InvalidValueError(
                f"Store(allow={self.allow!r}): need a collection of names, such as {{{self.allow!r}}}."
            )

    @classmethod
    def of(cls, store: "Store | str | Path") -> "Store":
        """The store that an argument ``store`` means."""
        made = store if isinstance(store, Store) else cls(store)
        # `improve` is lazy: by the time that it begins, the working directory may be another one.
        return replace(made, folder=Path(made.folder).absolute())


@value
class RunCall:
    """One call of `improve` or `enhance` on a run: all that counts."""

    started: str
    """UTC, ISO 8601."""
    prompts: int
    prompts_digest: str
    settings: dict[str, str]
    """By dotted name: every setting of every part that counts."""
    versions: dict[str, str]
    """Of packages, Python and the device."""


@value
class RunRecord:
    """The content of ``run.json``."""

    version: int
    calls: tuple[RunCall, ...]
    """The first, and each later one that differed from the one before."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run."""

    path: Path

    def __post_init__(self) -> None:
        # Pictures are read whenever they are looked at, also after a change of the working directory.
        object.__setattr__(self, "path", self.path.absolute())

    @property
    def images(self) -> ImageFolder:
        """Its pictures."""
        return ImageFolder(self.path / "images")

    @property
    def latents(self) -> Path:
        """The trainer's cache."""
        return self.path / "latents"

    @property
    def measure(self) -> Path:
        """What was drawn of held-out prompts, for all rounds: the round after one is compared with its pictures."""
        return self.path / "measure"

    def make(self) -> None:
        """Make the folder.

        Raises:
            StorageError: if it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"the run's folder {self.path} could not be made: {error}. {_REMEDY}") from error

    def round(self, number: int) -> RoundFolder:
        """The folder of a round, counted from 1."""
        return RoundFolder(self.path / f"round-{number}", self.images)

    def begun_rounds(self) -> list[int]:
        """The numbers of the rounds that have begun."""
        numbers = (folder.name.removeprefix("round-") for folder in self.path.glob("round-*") if folder.is_dir())
        return sorted(int(number) for number in numbers if number.isdecimal())

    def read(self) -> RunRecord | None:
        """What ``run.json`` says; None for a folder in which no run has begun.

        Raises:
            StorageError: if it is damaged, of a later version, or if the folder holds something else.
        """
        path = self.path / "run.json"
        remedy = "Take another folder, or restore the file from a copy."
        try:
            record = read_segment(path, RunRecord, what="record of a run", remedy=remedy)
        except FileNotFoundError:
            others = [] if not self.path.is_dir() else sorted(entry.name for entry in self.path.iterdir())
            foreign = [name for name in others if name not in _OWN and name[0] != "."]
            if any(name.startswith("round-") for name in foreign):
                raise StorageError(
                    f"{path} is gone, and there are rounds beside it, of a run that nothing can be compared with. {remedy}"
                ) from None
            if foreign:
                raise StorageError(
                    f"{self.path} holds other files than a run's, such as {foreign[0]!r}, and no run.json. Give the run a "
                    "folder of its own."
                ) from None
            return None
        if record.version != _VERSION:
            raise StorageError(
                f"{path} is of version {record.version}, and this artaug reads version {_VERSION}. Install the artaug that "
                "began the run, or take another folder."
            )
        return record

    def check(self, call: RunCall, prompts: Sequence[str], *, allow: Collection[str]) -> None:
        """Refuse a call that would not go on with the run that is here; nothing is written.

        Raises:
            StorageError: if the folder cannot be written to, or something differs that is not allowed to, naming it.
            InvalidValueError: for a name in ``allow`` that nothing has.
        """
        check_writable(self.path, what="the run's folder")
        record = self.read()
        if record is None:
            return
        last = record.calls[-1]
        names = {*last.settings, *call.settings, *last.versions, *call.versions, "prompts"}
        unknown = [name for name in allow if not any(_is_under(other, name) for other in names)]
        if unknown:
            known = sorted({name.partition(".")[0] for name in names})
            raise InvalidValueError(
                f"Store(allow={set(allow)!r}): nothing is called {unknown[0]!r}. There are: {', '.join(known)}."
            )
        found = [
            (name, line)
            for name, line in _differences(last, call, prompts)
            if not any(_is_under(name, allowed) for allowed in allow)
        ]
        if found:
            differences = [line for _, line in found]
            names = {*allow, *(name.partition(".")[0] if len(found) > _MAX_LISTED else name for name, _ in found)}
            advice = (
                ""  # what no name allows
                if "" in names
                else f"; or allow it by name, store=artaug.Store({str(self.path)!r}, allow={sorted(names)!r})"
            )
            more = len(differences) - _MAX_LISTED
            listed = "\n- ".join(differences[:_MAX_LISTED] + [f"and {more} more"] * (more > 0))
            raise StorageError(
                f"{self.path} holds a run that was called with other arguments, which would be another run:\n- {listed}\n"
                f"Call it as before, or take another folder{advice}."
            )

    def segments_naming(self, text: str) -> list[Path]:
        """The finished chunks of pictures whose digest is in a text."""
        digests = [found.encode() for found in _DIGEST.findall(text)]
        chunks = sorted(self.path.glob("round-*/attempts/*.json")) if digests else []
        return [path for path in chunks if any(name in path.read_bytes() for name in digests)]

    def begin(self, call: RunCall) -> None:
        """Write the call down, if it is the first or differs from the one before.

        Raises:
            StorageError: if it cannot be written.
        """
        record = self.read()
        calls = () if record is None else record.calls
        if calls and (calls[-1].settings, calls[-1].versions, calls[-1].prompts_digest) == (
            call.settings,
            call.versions,
            call.prompts_digest,
        ):
            return
        write_segment(
            self.path / "run.json", RunRecord(_VERSION, (*calls, call)), what="the record of the run", remedy=_REMEDY
        )

    def groups(self, number: int, prompts: int) -> tuple[int, ...]:
        """The numbers of prompts that a round has had, the last one all of it; begins the round if it has not.

        Prompts that are added take part in the newest round that has begun, and in those after it. If that was finished, it
        is opened again: its training will learn from all pairs.

        Raises:
            StorageError: if that cannot be written.
        """
        begun, folder = self.begun_rounds(), self.round(number)
        groups = folder.groups()
        if groups is None or (prompts > groups[-1] and number == begun[-1]):
            groups = (*(groups or ()), prompts)
            folder.begin(groups)
        return groups


def describe_call(settings: Mapping[str, str], prompts: Sequence[str]) -> RunCall:
    """The record of a call that begins now."""
    return RunCall(
        datetime.now(UTC).isoformat(timespec="seconds"),
        len(prompts),
        digest(*prompts),
        dict(settings),
        installed_versions(),
    )


def _is_under(name: str, beginning: str) -> bool:
    return name == beginning or name.startswith(f"{beginning}.")


def _differences(before: RunCall, now: RunCall, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """The name of each thing that differs, and a line that says how."""
    lines = []
    if before.prompts_digest != now.prompts_digest:
        added = now.prompts - before.prompts
        if added > 0 and digest(*prompts[: before.prompts]) == before.prompts_digest:
            lines.append(("prompts", f"prompts: {added} more than the {before.prompts} before"))
        else:
            # Not allowed by any name: attempts are keyed by the place of their prompt.
            lines.append(("", f"prompts: other ones, or in another order ({before.prompts} then, {now.prompts} now)"))
    pairs = ((before.settings, now.settings), (before.versions, now.versions))
    for then, here in pairs:
        for name in sorted({*then, *here}):
            if then.get(name) != here.get(name):
                why = _FIXED.get(name, "")
                if name == "rounds" and name in then and name in here and int(here[name]) < int(then[name]):
                    why = "there may be more of them, not fewer"
                line = f"{name}: {then.get(name, 'nothing')} then, {here.get(name, 'nothing')} now"
                lines.append(("", f"{line} ({why})") if why else (name, line))
    return lines
