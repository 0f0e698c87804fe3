"""How other programs read LoRA files: for every family the keys that each of them looks up, and what it leaves out.

Facts, written down from the programs' published code as it was in November 2026; the files are named at each program. They
have two uses. `artaug.diffusion.verify_export` reads a file by the rules of each program, which says what will read it
whole, and is a witness where diffusers has no reader. And the table in the documentation is compared with them.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from artaug._internal.mappings import FrozenDict
from artaug.lora.formats.key_maps import Format, KeyMap, KeyMatch

_DOWN_UP = (".lora_down.weight",)
_A_B = (".lora_A.weight",)
_DEFAULT = (".lora_A.default.weight",)
_ANY = (*_DOWN_UP, *_A_B, *_DEFAULT, ".lora.down.weight")


class Names(Enum):
    """How a program calls layers: by diffusers' names or by the original ones, with dots or, flat, with underscores."""

    DIFFUSERS = (False, False)
    FLAT_DIFFUSERS = (False, True)
    ORIGINAL = (True, False)
    FLAT_ORIGINAL = (True, True)

    def __init__(self, is_original: bool, is_flat: bool) -> None:
        self.is_original: bool = is_original
        self.is_flat: bool = is_flat


@dataclass(frozen=True)
class KeyStyle:
    """Keys that a program looks up for the layers of one family."""

    prefix: str
    names: Names = Names.DIFFUSERS
    endings: tuple[str, ...] = _ANY
    """Of the keys of ``LowRank.down`` that it knows."""
    ignored: str = ""
    """Layers that it does not look up like this, or reads wrongly: a regular expression for parts of diffusers' names."""
    whole_rows: bool = False
    """Of a layer that the original model fuses it wants all parts, or none: the MLP of a single block may be missing."""
    one_strength: bool = False
    """It takes the alpha over rank of one layer for that of all."""

    def stem(self, name: str, match: KeyMatch) -> str | None:
        """The key of a layer without its ending; None if the program does not look for the layer."""
        if self.ignored and re.search(self.ignored, name):
            return None
        key = match.original if self.names.is_original else name
        return self.prefix + (key.replace(".", "_") if self.names.is_flat else key)


@dataclass(frozen=True, eq=False)
class Program:
    """A program, and its rules for the families that it draws."""

    name: str
    styles: Mapping[str, tuple[KeyStyle, ...]]
    """By the name of the key map."""
    reads_header: bool = False
    """It takes alpha from the header, where PEFT keeps its config; the others see factors and alphas alone."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "styles", FrozenDict(self.styles))

    def dropped(self, key_map: KeyMap, format_: Format) -> tuple[str, ...]:
        """The layers, as the key map writes them, that the program does not find in files that `LoRA.save` writes."""
        key_format = key_map.key_formats[format_]
        rows = [row for row in key_map.rows if row.original not in key_format.unsupported]
        layers = {path.replace("{}", "0"): path for row in rows for path in row.diffusers}
        matches = {name: match for name in layers if (match := key_map.match(name)) is not None}
        written = {
            key_format.stem(match.original if key_format.original_names else name) + key_format.down
            for name, match in matches.items()
        }
        found = self.find(matches, written, key_map)
        return tuple(path for name, path in layers.items() if name not in found)

    def find(
        self, matches: Mapping[str, KeyMatch], keys: Collection[str], key_map: KeyMap
    ) -> dict[str, tuple[str, KeyStyle]]:
        """The stem of the key that the program takes each layer from, and its rule.

        Args:
            matches: the rows of the layers.
            keys: all keys of the file.
            key_map: the family that the program takes the file for.
        """
        found: dict[str, tuple[str, KeyStyle]] = {}
        for name, match in matches.items():
            for style in self.styles.get(key_map.name, ()):
                stem = style.stem(name, match)
                if stem is not None and any(stem + ending in keys for ending in style.endings):
                    found.setdefault(name, (stem, style))
        return {
            name: (stem, style)
            for name, (stem, style) in found.items()
            if not style.whole_rows or _is_whole(matches[name], found)
        }


def _is_whole(match: KeyMatch, found: Collection[str]) -> bool:
    return all(path in found for path in match.diffusers if not path.endswith("proj_mlp"))


# Names outside the blocks; those of FLUX.1, FLUX.2 and Chroma are also the layers that diffusers' own converters lose
_OUTSIDE_BLOCKS = r"^(?!.*blocks\.\d)"
_OUTSIDE_UNET_BLOCKS = r"^(conv_in|conv_out|time_embedding|add_embedding)\b"
_FLUX2_STREAMS = "stream_modulation"

# src/diffusers/loaders/lora_conversion_utils.py and lora_pipeline.py, diffusers 0.42.1; verify_export runs it, too
DIFFUSERS = Program(
    "diffusers",
    {
        "FLUX.1": (
            KeyStyle("transformer."),
            KeyStyle("lora_unet_", Names.FLAT_ORIGINAL, _DOWN_UP, _OUTSIDE_BLOCKS),
            KeyStyle("diffusion_model.", Names.ORIGINAL, _DOWN_UP, _OUTSIDE_BLOCKS),
        ),
        "Chroma": (
            KeyStyle("transformer."),
            KeyStyle("lora_unet_", Names.FLAT_ORIGINAL, _DOWN_UP, _OUTSIDE_BLOCKS),
            KeyStyle("diffusion_model.", Names.ORIGINAL, _DOWN_UP, _OUTSIDE_BLOCKS),
        ),
        "FLUX.2": (
            KeyStyle("transformer."),
            KeyStyle("lora_unet_", Names.FLAT_ORIGINAL, _DOWN_UP, rf"{_FLUX2_STREAMS}|guidance_embedder|norm_out"),
            # it swaps the halves of norm_out in a checkpoint and not in a LoRA
            KeyStyle("diffusion_model.", Names.ORIGINAL, _A_B, "norm_out"),
            KeyStyle("base_model.model.", Names.ORIGINAL, _A_B, "norm_out"),
            KeyStyle("diffusion_model.", endings=_A_B, ignored=_OUTSIDE_BLOCKS),
            KeyStyle("base_model.model.", endings=_A_B, ignored=_OUTSIDE_BLOCKS),
        ),
        "Stable Diffusion 3": (KeyStyle("transformer."),),
        "Stable Diffusion XL": (
            KeyStyle("unet."),
            KeyStyle("lora_unet_", Names.FLAT_ORIGINAL, _DOWN_UP),
            KeyStyle("lora_unet_", Names.FLAT_DIFFUSERS, _DOWN_UP, "add_embedding"),
        ),
        "Stable Diffusion 1.5": (KeyStyle("unet."), KeyStyle("lora_unet_", Names.FLAT_DIFFUSERS, _DOWN_UP)),
        "Qwen-Image": (
            KeyStyle("transformer."),
            KeyStyle("lora_unet_", Names.FLAT_DIFFUSERS, _DOWN_UP),
            KeyStyle("diffusion_model."),
            KeyStyle("", endings=_DEFAULT),
        ),
        "Z-Image": (
            KeyStyle("transformer."),
            KeyStyle("lora_unet_", Names.FLAT_ORIGINAL, _DOWN_UP, "all_"),
            KeyStyle("lora_unet_", Names.FLAT_DIFFUSERS, _DOWN_UP),
            KeyStyle("diffusion_model."),
            KeyStyle("", endings=_DEFAULT),
        ),
    },
    reads_header=True,
)

# comfy/lora.py at 17358c8f (load_lora, model_lora_keys_unet), comfy/utils.py at 09708eae (…_to_diffusers): the original
# names for every model, and tables of diffusers' names for some
_COMFYUI_ORIGINAL = (KeyStyle("lora_unet_", Names.FLAT_ORIGINAL), KeyStyle("diffusion_model.", Names.ORIGINAL))
_COMFYUI_FLUX = (
    *(
        KeyStyle(prefix, names, ignored=f"{_FLUX2_STREAMS}|time_guidance_embed|distilled_guidance_layer")
        for prefix, names in (
            ("transformer.", Names.DIFFUSERS),
            ("", Names.DIFFUSERS),
            ("lora_transformer_", Names.FLAT_DIFFUSERS),
            ("lycoris_", Names.FLAT_DIFFUSERS),
        )
    ),
    *_COMFYUI_ORIGINAL,
)
# of a U-Net it looks for `attn1.processor.to_q`, never for `attn1.to_q`
_COMFYUI_UNET = (
    KeyStyle("unet.", ignored=r"\.to_"),
    KeyStyle("", ignored=r"\.to_"),
    KeyStyle("lora_unet_", Names.FLAT_DIFFUSERS),
    KeyStyle("lycoris_", Names.FLAT_DIFFUSERS),
    *_COMFYUI_ORIGINAL,
)
COMFYUI = Program(
    "ComfyUI",
    {
        "FLUX.1": _COMFYUI_FLUX,
        "Chroma": _COMFYUI_FLUX,
        "FLUX.2": _COMFYUI_FLUX,
        "Stable Diffusion 3": (
            KeyStyle("transformer."),
            KeyStyle("base_model.model."),
            KeyStyle("lora_transformer_", Names.FLAT_DIFFUSERS),
            *_COMFYUI_ORIGINAL,
        ),
        "Stable Diffusion XL": _COMFYUI_UNET,
        "Stable Diffusion 1.5": _COMFYUI_UNET,
        "Qwen-Image": (
            KeyStyle(""),
            KeyStyle("transformer."),
            KeyStyle("lycoris_", names=Names.FLAT_DIFFUSERS),
            *_COMFYUI_ORIGINAL,
        ),
        "Z-Image": (
            KeyStyle("diffusion_model."),
            KeyStyle("transformer."),
            KeyStyle("lycoris_", names=Names.FLAT_DIFFUSERS),
            KeyStyle(""),
            *_COMFYUI_ORIGINAL,
        ),
    },
)

# diffsynth/utils/lora/general.py at 237d1787 takes the names of its own models, which are diffusers' except for FLUX.1's;
# flux.py at 3ee3cc31 renames the layers in FLUX.1's blocks and fuses the parts of each
_DIFFSYNTH_GENERAL = (KeyStyle(""), KeyStyle("diffusion_model."))
DIFFSYNTH_STUDIO = Program(
    "DiffSynth-Studio",
    {
        "FLUX.1": (
            KeyStyle("transformer.", Names.DIFFUSERS, _A_B, _OUTSIDE_BLOCKS, whole_rows=True),
            KeyStyle("lora_unet_", Names.FLAT_ORIGINAL, _DOWN_UP, _OUTSIDE_BLOCKS, one_strength=True),
        ),
        "FLUX.2": _DIFFSYNTH_GENERAL,
        "Qwen-Image": _DIFFSYNTH_GENERAL,
        "Z-Image": _DIFFSYNTH_GENERAL,
    },
)

# networks/lora.py at 02298e3c, lora_flux.py at 450630c6, lora_sd3.py at 077f6a4f: layers of the classes that it trains; of a
# U-Net the linear layers and convolutions of Transformer2DModel, ResnetBlock2D, Downsample2D and Upsample2D
SD_SCRIPTS = Program(
    "sd-scripts",
    {
        "FLUX.1": (KeyStyle("lora_unet_", Names.FLAT_ORIGINAL, _DOWN_UP, "^(norm_out|proj_out)"),),
        "Stable Diffusion 3": (KeyStyle("lora_unet_", Names.FLAT_ORIGINAL, _DOWN_UP),),
        "Stable Diffusion XL": (KeyStyle("lora_unet_", Names.FLAT_ORIGINAL, _DOWN_UP, _OUTSIDE_UNET_BLOCKS),),
        "Stable Diffusion 1.5": (KeyStyle("lora_unet_", Names.FLAT_DIFFUSERS, _DOWN_UP, _OUTSIDE_UNET_BLOCKS),),
    },
)

# src/musubi_tuner/utils/lora_utils.py at 0bcd20e7: `lora_unet_` and the name of any weight of its own models
MUSUBI_TUNER = Program(
    "musubi-tuner",
    {
        "FLUX.2": (KeyStyle("lora_unet_", Names.FLAT_ORIGINAL, _DOWN_UP),),
        "Qwen-Image": (KeyStyle("lora_unet_", Names.FLAT_DIFFUSERS, _DOWN_UP),),
        "Z-Image": (KeyStyle("lora_unet_", Names.FLAT_DIFFUSERS, _DOWN_UP),),
    },
)

PROGRAMS = (DIFFUSERS, COMFYUI, DIFFSYNTH_STUDIO, SD_SCRIPTS, MUSUBI_TUNER)
"""The programs whose rules are written down here."""


def reader_table(key_maps: Collection[KeyMap]) -> Iterator[tuple[str, ...]]:
    """The table of the documentation: its header, then family and format with a word for each program.

    ``whole``: every layer that the format can carry; ``blocks``: every one in the model's blocks; ``part``; or nothing.
    """
    yield ("family", "format", *(program.name for program in PROGRAMS))
    for key_map in key_maps:
        for format_, key_format in key_map.key_formats.items():
            rows = [row for row in key_map.rows if row.original not in key_format.unsupported]
            layers = [path for row in rows for path in row.diffusers]
            name = f"{format_} (default)" if format_ is key_map.default_format else str(format_)
            yield (key_map.name, name, *(_word(program.dropped(key_map, format_), layers) for program in PROGRAMS))


def _word(dropped: Collection[str], layers: Collection[str]) -> str:
    if not dropped:
        return "whole"
    if len(dropped) == len(layers):
        return ""
    return "part" if any("block" in path or "{}" in path for path in dropped) else "blocks"
