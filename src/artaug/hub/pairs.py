"""The pairs of a run as Parquet files for a dataset on the Hub, pictures included, and the dataset's card."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import DatasetCardData
from PIL.Image import Image

from artaug._internal.extras import optional
from artaug._internal.files import check_disk_space
from artaug._internal.values import to_json
from artaug.errors import NothingToLearnError
from artaug.hub.card import TAG
from artaug.image_files import ImageFile
from artaug.pairs import Dropped, Kept
from artaug.stored_runs import Run

if TYPE_CHECKING:
    import pyarrow as pa

SHARD_BYTES = 500_000_000
"""Pictures in a file, as the Hub recommends."""
_GROUP_BYTES, _GROUP_ROWS = 64_000_000, 100
"""Pictures and rows that are held in memory, and read together by a reader."""
_FEATURES = {
    "before": "image",
    "after": "image",
    "prompt": "string",
    "seed": "int64",
    "plan": "string",
    "round": "int64",
    "kept": "bool",
    "reason": "string",
}
_CARD = """\
# {name}

{count} pairs of pictures of one prompt and one seed, drawn by [artaug](https://pypi.org/project/artaug): `before` from the prompt
alone, `after` from a plan that a critic wrote about it. {kept} of them were kept by the run's filter, and `reason` says why.

```python
from datasets import load_dataset

pairs = load_dataset("{repo}", split="train")
pairs[0]["before"], pairs[0]["after"], pairs[0]["prompt"]
```

`plan` is JSON: the prompt, and regions with prompts of their own. Pictures are stored without loss.
"""


@dataclass(frozen=True, kw_only=True)
class PairsContents:
    """The arguments of a push of pairs that decide about the files."""

    repo: str
    run: Run
    dropped: bool
    """Whether pairs that the filter dropped are in it, too."""
    shard_bytes: int = SHARD_BYTES

    def write(self, folder: Path) -> str:
        """Write the card and the data, one row after the other; return the text of the card.

        Raises:
            MissingExtraError: if pyarrow is not installed.
            NothingToLearnError: if there is no pair.
            StorageError: if a picture is damaged, or there is no room.
        """
        with optional("pyarrow", required_by="hub.push_pairs", extra="parquet"):
            import pyarrow.parquet  # noqa: F401, PLC0415 - an extra
        check_disk_space(folder, self._picture_bytes(), what="the Parquet files before their upload")
        (folder / "data").mkdir()
        paths, count, kept = [], 0, 0
        for number, shard in enumerate(self._shards()):
            path = folder / "data" / f"train-{number:05d}.parquet"
            for row in _written(path, shard):
                count += 1
                kept += row["kept"]
            paths.append(path.relative_to(folder).as_posix())
        if not paths:
            raise NothingToLearnError(f"{self.run!r} has no {'' if self.dropped else 'kept '}pair to push yet.")
        # Each file is named, since those of an earlier push stay in the repository.
        header = DatasetCardData(
            task_categories=["text-to-image"],
            tags=[TAG],
            configs=[{"config_name": "default", "data_files": [{"split": "train", "path": paths}]}],
            dataset_info={"features": [{"name": name, "dtype": kind} for name, kind in _FEATURES.items()]},
        )
        body = _CARD.format(name=self.repo.partition("/")[2], repo=self.repo, count=f"{count:,}", kept=f"{kept:,}")
        text = f"---\n{header.to_yaml()}\n---\n\n{body}\nMade with artaug {version('artaug')}.\n"
        (folder / "README.md").write_text(text, encoding="utf-8", newline="\n")
        return text

    def _attempts(self) -> Iterator[tuple[int, Kept | Dropped]]:
        """The pairs with the numbers of their rounds."""
        for number in self.run.begun_rounds:
            for attempt in self.run.attempts(number):
                if isinstance(attempt, Kept) or (self.dropped and isinstance(attempt, Dropped)):
                    yield number, attempt

    def _picture_bytes(self) -> int:
        files = (file for _, attempt in self._attempts() for file in attempt.pair.references)
        return sum(file.path.stat().st_size for file in files if isinstance(file, ImageFile) and file.path.exists())

    def _shards(self) -> Iterator[Iterator[dict[str, Any]]]:
        """The rows of each file; those of one have to be taken before the next."""
        rows = map(_row, self._attempts())
        while (first := next(rows, None)) is not None:
            yield _until_full(first, rows, self.shard_bytes)


def _until_full(first: dict[str, Any], rows: Iterator[dict[str, Any]], limit: int) -> Iterator[dict[str, Any]]:
    total = _size_of(first)
    yield first
    while total < limit and (row := next(rows, None)) is not None:
        total += _size_of(row)
        yield row


def _size_of(row: dict[str, Any]) -> int:
    return len(row["before"]["bytes"]) + len(row["after"]["bytes"])


def _row(numbered: tuple[int, Kept | Dropped]) -> dict[str, Any]:
    number, attempt = numbered
    pair = attempt.pair
    before, after = pair.references
    return {
        "before": _image(before),
        "after": _image(after),
        "prompt": pair.prompt,
        "seed": pair.seed,
        "plan": to_json(pair.plan),
        "round": number,
        "kept": isinstance(attempt, Kept),
        "reason": attempt.verdict.reason,
    }


def _image(file: Image | ImageFile) -> dict[str, Any]:
    """A picture as ``datasets`` stores it: the bytes of its file, after a look that they are its pixels."""
    assert isinstance(file, ImageFile)  # noqa: S101 - those of a run on disk
    file.load()
    return {"bytes": file.path.read_bytes(), "path": file.path.name}


def _written(path: Path, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Write rows to a file, and give each back."""
    import pyarrow as pa  # noqa: PLC0415 - an extra
    import pyarrow.parquet as pq  # noqa: PLC0415

    schema = _schema()
    with pq.ParquetWriter(path, schema) as writer:
        group: list[dict[str, Any]] = []
        size = 0
        for row in rows:
            group.append(row)
            size += _size_of(row)
            if size >= _GROUP_BYTES or len(group) >= _GROUP_ROWS:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                group, size = [], 0
            yield row
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))


def _schema() -> "pa.Schema":
    """The columns, with what ``datasets`` reads to show pictures as pictures."""
    import pyarrow as pa  # noqa: PLC0415 - an extra

    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {"image": image, "string": pa.string(), "int64": pa.int64(), "bool": pa.bool_()}
    features = {
        name: {"_type": "Image"} if kind == "image" else {"dtype": kind, "_type": "Value"}
        for name, kind in _FEATURES.items()
    }
    schema = pa.schema([(name, types[kind]) for name, kind in _FEATURES.items()])
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
