"""The files of a push, written to a folder."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from artaug._internal.files import file_sha256
from artaug.errors import LoRAError
from artaug.evaluation.comparison import Comparison
from artaug.hub.card import Contents, card
from artaug.hub.values import Base, PushedFile, Sample
from artaug.lora.formats import Format, KeyMap
from artaug.lora.lora import LoRA
from artaug.run.results import Enhancement

UNIVERSAL = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for."""
_CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """All that a push may hold."""

    repo: str
    home: str
    """The address of the Hub."""
    result: Enhancement | LoRA
    base: Base | None
    multiplier: float
    key_map: KeyMap | None
    comparison: Comparison | None
    about: Mapping[str, object]
    samples: Sequence[Sample]

    def pack(self, folder: Path) -> str:
        """Write every file; give the text of the card."""
        lora = self.result if isinstance(self.result, LoRA) else self.result.lora
        lora.save(folder / UNIVERSAL, key_map=self.key_map, metadata=self._header())
        twin, written = self._twin(lora, folder), True
        if isinstance(twin, LoRAError):
            twin, written = str(twin), False
        text = card(
            Contents(
                repo=self.repo,
                home=self.home,
                base=self.base,
                layers=len(lora.layers),
                rank=lora.rank,
                multiplier=self.multiplier,
                universal=UNIVERSAL,
                twin=twin,
                twin_written=written,
                made=self.result if isinstance(self.result, Enhancement) else None,
                comparison=self.comparison,
                about=self.about,
                samples=self.samples,
                pictures=tuple(self._pictures(folder)),
            )
        )
        (folder / _CARD).write_text(text, encoding="utf-8", newline="\n")
        return text

    def _twin(self, lora: LoRA, folder: Path) -> str | LoRAError:
        """The file for readers of kohya's names, or why this family has none."""
        name = f"{self.repo.partition('/')[2]}_comfyui_kohya.safetensors"
        try:
            lora.save(folder / name, format=Format.KOHYA, key_map=self.key_map, metadata=self._header())
        except LoRAError as fault:
            return fault
        return name

    def _header(self) -> dict[str, str]:
        """Provenance, in the files themselves."""
        header = {"artaug.version": version("artaug"), "artaug.repository": self.repo}
        if self.base is not None:
            header["artaug.base_model"] = self.base.repo
            if self.base.revision is not None:
                header["artaug.base_model_revision"] = self.base.revision
        return header

    def _pictures(self, folder: Path) -> Iterator[str]:
        """Write the samples' pictures, before and after side by side where both are there; give their paths."""
        for number, sample in enumerate(self.samples, start=1):
            path = folder / "images" / f"sample-{number}.png"
            path.parent.mkdir(exist_ok=True)
            sample.image.save(path)
            if sample.before is not None:
                sample.before.save(path.with_stem(f"{path.stem}-before"))
            yield path.relative_to(folder).as_posix()


def listed(folder: Path) -> tuple[PushedFile, ...]:
    """Every file of a folder, by path."""
    return tuple(_described(path, folder) for path in sorted(folder.rglob("*")) if path.is_file())


def _described(path: Path, folder: Path) -> PushedFile:
    return PushedFile(path.relative_to(folder).as_posix(), path.stat().st_size, file_sha256(path))
