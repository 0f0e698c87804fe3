"""The content of a repository: its files, written to a folder before they are uploaded."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from artaug._internal.files import file_sha256
from artaug._internal.images import as_rgb
from artaug.errors import LoRAError
from artaug.evaluation.comparison import Comparison
from artaug.hub.card import CardFields, render_card
from artaug.hub.values import Base, PushedFile, Sample
from artaug.lora.formats import Format, KeyMap
from artaug.lora.lora import LoRA
from artaug.run.results import Enhancement

PEFT_FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for."""
_CARD = "README.md"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RepoContents:
    """The arguments of a push that decide about the files."""

    repo: str
    endpoint: str
    """The URL of the Hub."""
    result: Enhancement | LoRA
    base: Base | None
    multiplier: float
    key_map: KeyMap | None
    comparison: Comparison | None
    about: Mapping[str, object]
    samples: Sequence[Sample]

    def write(self, folder: Path) -> str:
        """Write every file; return the text of the card."""
        lora = self.result if isinstance(self.result, LoRA) else self.result.lora
        lora.save(folder / PEFT_FILE, format=Format.PEFT, key_map=self.key_map, metadata=self._header())
        kohya_file, has_kohya_file = f"{self.repo.partition('/')[2]}_comfyui_kohya.safetensors", True
        try:
            lora.save(folder / kohya_file, format=Format.KOHYA, key_map=self.key_map, metadata=self._header())
        except LoRAError as error:  # the family has no such format
            has_kohya_file = False
            _LOG.warning("there is no file in kohya's format: %s", error)
        text = render_card(
            CardFields(
                repo=self.repo,
                endpoint=self.endpoint,
                base=self.base,
                layers=len(lora.layers),
                rank=lora.rank,
                multiplier=self.multiplier,
                peft_file=PEFT_FILE,
                kohya_file=kohya_file,
                has_kohya_file=has_kohya_file,
                enhancement=self.result if isinstance(self.result, Enhancement) else None,
                comparison=self.comparison,
                about=self.about,
                samples=self.samples,
                image_paths=tuple(self._write_images(folder)),
            )
        )
        (folder / _CARD).write_text(text, encoding="utf-8", newline="\n")
        return text

    def _header(self) -> dict[str, str]:
        """Provenance, for the metadata of the LoRA files."""
        header = {"artaug.version": version("artaug"), "artaug.repository": self.repo}
        if self.base is not None:
            header["artaug.base_model"] = self.base.repo
            if self.base.revision is not None:
                header["artaug.base_model_revision"] = self.base.revision
        return header

    def _write_images(self, folder: Path) -> Iterator[str]:
        """Write the images of the samples, and those without the LoRA beside them; yield the paths of the former."""
        for number, sample in enumerate(self.samples, start=1):
            path = folder / "images" / f"sample-{number}.png"
            path.parent.mkdir(exist_ok=True)
            as_rgb(sample.image).save(path)
            if sample.before is not None:
                as_rgb(sample.before).save(path.with_stem(f"{path.stem}-before"))
            yield path.relative_to(folder).as_posix()


def list_files(folder: Path) -> tuple[PushedFile, ...]:
    """All files of a folder, in the order of their paths."""
    return tuple(
        PushedFile(path.relative_to(folder).as_posix(), path.stat().st_size, file_sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    )
