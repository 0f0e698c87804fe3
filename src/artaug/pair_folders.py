"""Pairs that are in folders: pictures matched by their names or by a ``metadata.jsonl``, and pairs written as such."""

import csv
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from artaug._internal.annotations import checked
from artaug._internal.arguments import argument_error, check_count, check_items
from artaug._internal.decoding import decode_json
from artaug._internal.files import atomic_write
from artaug._internal.values import from_json, to_json
from artaug.errors import InvalidValueError, StorageError
from artaug.image_files import ImageFile, ImageFolder, image_digest, read_image
from artaug.pairs import ImagePair
from artaug.plan import Plan, check_storable

_LOG = logging.getLogger(__name__)
_METADATA = "metadata.jsonl"
_NAME_COLUMNS = ("file_name", "before_file_name")
_PROMPT_COLUMNS = ("prompt", "text", "caption")
_BESIDE_PICTURES = {".txt", ".csv", ".json", ".jsonl", ".md", ".parquet", ".db", ".ini"}
"""Endings of files that may lie among pictures. Any other file that is no picture is named."""
_MAX_LISTED = 20
_ORIENTATION = 0x0112
"""The tag of EXIF that says how to turn a picture; 1 is as it is."""


@checked
def pairs_to_folder(pairs: Sequence[ImagePair], folder: str | Path) -> Path:
    """Write pairs to a folder: pictures without loss, and a ``metadata.jsonl`` with a line for each pair.

    `pairs_from_folder` reads it, and so does ``datasets.load_dataset("imagefolder", data_dir=folder)``, with the columns
    ``before`` and ``after`` (pictures), ``prompt``, ``seed``, ``plan`` (JSON), ``before_digest`` and ``after_digest``, and
    ``rewards``, a list of two numbers, of pairs that have them.

    Args:
        pairs: in memory or by reference.
        folder: is made if it is missing.

    Returns:
        The path of the ``metadata.jsonl``.

    Raises:
        StorageError: if the system cannot write it, or a picture of a pair cannot be read.
        InvalidValueError: if other pairs are in the folder, or a plan is of a subclass with fields of its own, which no file keeps.

    >>> import tempfile
    >>> from PIL import Image
    >>> import artaug as aa
    >>> pair = aa.ImagePair.unchanged(Image.new("RGB", (64, 64)), prompt="a red cone", seed=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = aa.pairs_to_folder([pair], folder)
    ...     path.name, aa.pairs_from_folder(folder) == [pair]
    ('metadata.jsonl', True)
    """
    check_items("pairs_to_folder", "pairs", pairs, ImagePair)
    path = Path(folder) / _METADATA
    store = ImageFolder(path.parent / "images")
    for pair in pairs:
        check_storable(pair.plan)
    pictures = [picture for pair in pairs for picture in pair.references]
    canvases = [pair.plan.canvas for pair in pairs if pair.plan.canvas is not None]
    files = iter([store.get(image_digest(picture), size=picture.size) for picture in pictures])
    rows = [metadata_row(pair.holding(next(files), next(files)), path.parent) for pair in pairs]
    text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
        raise InvalidValueError(
            f"pairs_to_folder: {path} is there already, with other pairs. Choose another folder, or delete that file."
        )
    store.add_all([*pictures, *(picture for canvas in canvases for picture in canvas.pictures)])
    with atomic_write(path, what="the list of pairs", remedy="Make room, or choose another folder.") as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
    return path


def metadata_row(pair: ImagePair, folder: Path) -> dict[str, Any]:
    """A pair as a line of the ``metadata.jsonl`` in a folder, whose pictures are files somewhere in that folder.

    Raises:
        InvalidValueError: if they are in memory.
    """
    row: dict[str, Any] = {}
    for side, file in zip(("before", "after"), pair.references, strict=True):
        if not isinstance(file, ImageFile):
            raise InvalidValueError(f"{pair!r} holds its pictures in memory. Store it first: pair.stored_in(folder).")
        row[f"{side}_file_name"] = file.path.relative_to(folder).as_posix()
        row[f"{side}_digest"] = file.digest
    rewards = {} if pair.rewards is None else {"rewards": list(pair.rewards)}
    return {**row, "prompt": pair.prompt, "seed": pair.seed, "plan": to_json(pair.plan), **rewards}


@checked
def pairs_from_folder(
    before: str | Path,
    after: str | Path | None = None,
    *,
    captions: Mapping[str, str] | str | Path | None = None,
    size: tuple[int, int] | None = None,
) -> list[ImagePair]:
    """Read pairs of any origin, by reference: here each picture is opened for its header, and read whenever it is used.

    Of two folders, two pictures are a pair if their names are the same but for the ending: ``before/pets/cat.png`` and
    ``after/pets/cat.jpg``. One folder has a ``metadata.jsonl``, as `pairs_to_folder` writes it, and as the folder of a run has it,
    of which the kept pairs are read.

    Args:
        before: the folder of the pictures to lead away from; or the only folder.
        after: the folder of the pictures to lead to.
        captions: prompts by the names of pictures, with or without the ending; or the path of a ``.csv`` or ``.jsonl``
            file with a column ``file_name`` or ``before_file_name``, and ``prompt``, ``text`` or ``caption``. If not
            given, the prompt of ``cat.png`` is in ``cat.txt`` beside one of its two pictures.
        size: (width, height) of all pairs, in pixels. A picture of another size is cropped around its middle to that
            aspect, and resized, whenever it is read; the log says how many.

    Returns:
        The pairs, ordered by name, or as the ``metadata.jsonl`` has them. Without one, their seed is None and their plan
        ``Plan(prompt)``.

    Raises:
        InvalidValueError: naming all that does not fit: a picture without its twin or its caption, two of one name, two of
            different sizes (if ``size`` is not given), one that cannot be read, that EXIF data turn, that is transparent
            or has no RGB pixels, a line that is no pair; or if there is no picture.

    >>> import tempfile
    >>> from pathlib import Path, PurePath
    >>> from PIL import Image
    >>> import artaug as aa
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for side, color in (("before", "gray"), ("after", "red")):
    ...         (Path(folder) / side).mkdir()
    ...         Image.new("RGB", (64, 64), color).save(Path(folder) / side / "cone.png")
    ...     aa.pairs_from_folder(f"{folder}/before", f"{folder}/after", captions={"cone": "a red cone"})
    [ImagePair('a red cone', seed=None, 64 x 64 pixels, 0 regions)]
    """
    opener = _Opener(Path(before), _checked_size(size))
    if after is None:
        if captions is not None:
            raise InvalidValueError("pairs_from_folder: the captions of one folder are in its metadata.jsonl.")
        pairs = list(_listed_pairs(_checked_folder("before", before), opener))
    else:
        if captions is not None and not isinstance(captions, Mapping | str | Path):
            expected = "prompts by name, or the path of a .csv or .jsonl file"
            raise argument_error("pairs_from_folder", "captions", captions, expected=expected)
        folders = _checked_folder("before", before), _checked_folder("after", after)
        pairs = list(_matched_pairs(*folders, captions, opener))
    opener.raise_any()
    if not pairs:
        raise InvalidValueError(f"pairs_from_folder: there is no picture in {before}. Expected PNG, JPEG, WebP or so.")
    if opener.resized:
        _LOG.warning(
            "%d of %d pictures are cropped and resized to %s pixels whenever they are read",
            *(opener.resized, 2 * len(pairs), _times(pairs[0].size)),
        )
    return pairs


@dataclass
class _Opener:
    """Opens pictures by reference, and collects what does not fit, so that one error names it all."""

    folder: Path
    """In which a run, or `pairs_to_folder`, keeps the pictures of canvases, in ``images``."""
    size: tuple[int, int] | None
    """Of all pictures, if they are resized."""
    resized: int = 0
    faults: list[str] = field(default_factory=list)

    def open(self, path: Path, digest: str | None = None) -> ImageFile | None:
        """A picture, or None if its header shows that it does not fit."""
        try:
            size, fault = read_image(path, lambda image: (image.size, _fault_of(image)))
        except StorageError as error:
            self.faults.append(str(error))
            return None
        if fault:
            self.faults.append(f"{path} {fault}.")
            return None
        if self.size is None or self.size == size:
            return ImageFile(path, digest, size)
        self.resized += 1
        return ImageFile(path, None, self.size, resized=True)

    def pair(self, before: Path, after: Path, row: Mapping[str, Any]) -> Iterator[ImagePair]:
        """The pair of two pictures and the other fields of ``row``, if all fits."""
        first, second = self.open(before, row.get("before_digest")), self.open(after, row.get("after_digest"))
        if first is None or second is None:
            return
        plan = _plan_of(row.get("plan"))
        if plan is not None:
            plan = plan.found_in(ImageFolder(self.folder / "images"))
        if first.size != second.size:
            sizes = f"{_times(first.size)} and {_times(second.size)}"
            self.faults.append(
                f"{before} and {after} are of {sizes} pixels. Pass size=(width, height), or resize them."
            )
        elif plan is not None and (plan.regions or plan.canvas) and (first.resized or second.resized):
            moved = "regions" if plan.regions else "a canvas"
            self.faults.append(f"{before} has a plan with {moved}, which a crop would move. Leave size= out.")
        else:
            yield ImagePair(
                prompt=row["prompt"],
                seed=row.get("seed"),
                before=first,
                after=second,
                plan=plan,
                rewards=row.get("rewards"),
            )

    def raise_any(self) -> None:
        """Raise what was collected."""
        if self.faults:
            count, listed = len(self.faults), self.faults[:_MAX_LISTED]
            rest = [f"and {count - _MAX_LISTED} more"] if count > _MAX_LISTED else []
            things = "1 thing does" if count == 1 else f"{count} things do"
            raise InvalidValueError("\n- ".join([f"pairs_from_folder: {things} not fit:", *listed, *rest]))


def _fault_of(image: Image.Image) -> str:
    """Why a picture would not be read as its owner sees it, or nothing."""
    if image.mode in {"I", "F"}:
        return f"is of mode {image.mode}, which does not say which number is white: save it with 8 bits"
    if image.getexif().get(_ORIENTATION, 1) != 1:
        return "is turned by its EXIF data, which training does not see: save PIL.ImageOps.exif_transpose(image)"
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        return "has transparent pixels, which training would see as white: save it without them"
    return ""


def _matched_pairs(
    before: Path, after: Path, captions: Mapping[str, str] | str | Path | None, opener: _Opener
) -> Iterator[ImagePair]:
    """The pairs of two folders, by the names of their pictures."""
    prompts = _read_captions(captions, opener) if isinstance(captions, str | Path) else captions
    firsts, seconds = _pictures(before, opener), _pictures(after, opener)
    for name in sorted(firsts.keys() | seconds.keys()):
        first, second = firsts.get(name), seconds.get(name)
        if first is None or second is None:
            opener.faults.append(f"{first or second} has no twin in {before if first is None else after}.")
            continue
        found = _captions_beside(first, second) if prompts is None else _captions_of(name, first, before, prompts)
        if len(found) == 1:
            yield from opener.pair(first, second, {"prompt": found.pop()})
        else:
            opener.faults.append(f"{first} has {'two captions' if found else 'no caption'}. Expected one.")


def _pictures(folder: Path, opener: _Opener) -> dict[str, Path]:
    """The pictures of a folder, and of those in it, by their path in it without the ending."""
    endings = {ending for ending, name in Image.registered_extensions().items() if name in Image.OPEN}
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if path.is_dir() or any(part.startswith(".") for part in inner.parts):
            continue
        if path.suffix.lower() in endings:
            name = inner.with_suffix("").as_posix()
            if name in found:
                opener.faults.append(f"{found[name]} and {path} have one name. Keep one of them.")
            found[name] = path
        elif path.suffix.lower() not in _BESIDE_PICTURES:
            opener.faults.append(f"{path} is no picture that Pillow reads. Save it as PNG, or move it.")
    return found


def _captions_beside(*pictures: Path) -> set[str]:
    """The prompts in text files beside pictures."""
    texts = [path.with_suffix(".txt") for path in pictures]
    prompts = (text.read_text(encoding="utf-8-sig", errors="replace").strip() for text in texts if text.is_file())
    return {prompt for prompt in prompts if prompt}


def _captions_of(name: str, path: Path, folder: Path, prompts: Mapping[str, str]) -> set[str]:
    """The prompt of a picture among those by name: without the ending, with it, or with the folder's name before it."""
    inner = path.relative_to(folder).as_posix()
    found = (prompts.get(key) for key in (name, inner, f"{folder.name}/{inner}"))
    return {prompt.strip() for prompt in found if isinstance(prompt, str) and prompt.strip()}


def _read_captions(path: str | Path, opener: _Opener) -> dict[str, str]:
    """The prompts of a table, by the names of pictures."""
    path = Path(path)
    prompts: dict[str, str] = {}
    for number, row in _rows(path, opener):
        names = [row[column] for column in _NAME_COLUMNS if isinstance(row.get(column), str)]
        texts = [row[column] for column in _PROMPT_COLUMNS if isinstance(row.get(column), str)]
        if not names or not texts:
            columns = f"one of {', '.join(_NAME_COLUMNS)} and one of {', '.join(_PROMPT_COLUMNS)}"
            opener.faults.append(f"{path}, line {number}: has {sorted(map(str, row))}, expected {columns}.")
        else:
            prompts[names[0]] = texts[0]
    return prompts


def _listed_pairs(folder: Path, opener: _Opener) -> Iterator[ImagePair]:
    """The pairs of a ``metadata.jsonl``."""
    for number, row in _rows(folder / _METADATA, opener):
        if row.get("kept") is False:  # the folder of a run lists those that its filter dropped, too
            continue
        try:
            paths = [_path_in(folder, row.get(f"{side}_file_name")) for side in ("before", "after")]
            kinds = {"prompt": str, "seed": int | None, "before_digest": str | None, "after_digest": str | None}
            if wrong := [name for name, kind in kinds.items() if not isinstance(row.get(name), kind)]:
                raise InvalidValueError(f"{' and '.join(wrong)} cannot be read")  # noqa: TRY301 - one place for all
            pairs = list(opener.pair(paths[0], paths[1], row))
        except InvalidValueError as error:
            opener.faults.append(f"{folder / _METADATA}, line {number}: {str(error).rstrip('.')}.")
        else:
            yield from pairs


def _path_in(folder: Path, name: object) -> Path:
    if not isinstance(name, str) or not name or "\0" in name:
        raise InvalidValueError("before_file_name or after_file_name is missing")
    if PurePath(name).is_absolute() or PurePath(name).drive or ".." in PurePath(name).parts:
        raise InvalidValueError(f"{name!r} is not in the folder")
    return folder / name


def _plan_of(plan: object) -> Plan | None:
    """A plan from its JSON, as text or as the object that it describes."""
    if plan is None:
        return None
    return from_json(Plan, plan if isinstance(plan, str) else json.dumps(plan))


def _rows(path: Path, opener: _Opener) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a table with their line numbers, by column."""
    if path.suffix.lower() not in {".csv", ".jsonl"}:
        raise InvalidValueError(f"pairs_from_folder: {path} is no .csv or .jsonl file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValueError(f"pairs_from_folder: {path} cannot be read: {error}.") from error
    if path.suffix.lower() == ".csv":
        try:
            table = csv.DictReader(io.StringIO(text, newline=""))
            yield from ((table.line_num, row) for row in table)
        except csv.Error as error:
            opener.faults.append(f"{path} is no table: {error}.")
        return
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            row = decode_json(line) if line.strip() else None
        except ValueError as error:
            opener.faults.append(f"{path}, line {number}: {str(error).rstrip('.')}.")
            continue
        if isinstance(row, dict):
            yield number, row
        elif line.strip():
            opener.faults.append(f"{path}, line {number}: expected a JSON object.")


def _checked_folder(name: str, folder: str | Path) -> Path:
    if not Path(folder).is_dir():
        missing = "no folder" if Path(folder).exists() else "not there"
        raise InvalidValueError(
            f"pairs_from_folder({name}={str(folder)!r}): it is {missing}. Expected a folder of pictures; relative paths begin "
            f"at {str(Path.cwd())!r}."
        )
    return Path(folder)


def _checked_size(size: tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    if len(size) != 2:
        raise argument_error("pairs_from_folder", "size", size, expected="(width, height) in pixels")
    for side, number in enumerate(size):
        check_count("pairs_from_folder", f"size[{side}]", number)
    return int(size[0]), int(size[1])


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
