"""The formats of LoRA files: one table of layer names per model family, used for reading and for writing.

A LoRA maps the denoiser's own module paths to updates. A file names those layers in one of several ways, and fuses some of
them. A format that only artaug's own reader could verify is refused with an error.
"""

from artaug.lora.formats.key_maps import Format, KeyFormat, KeyMap, KeyRow
from artaug.lora.formats.known_maps import FLUX1, FLUX2, KEY_MAPS, QWEN_IMAGE, SD3, SD15, SDXL, Z_IMAGE
from artaug.lora.formats.load import ParsedLoRA, load_lora

__all__ = [
    "FLUX1",
    "FLUX2",
    "KEY_MAPS",
    "QWEN_IMAGE",
    "SD3",
    "SD15",
    "SDXL",
    "Z_IMAGE",
    "Format",
    "KeyFormat",
    "KeyMap",
    "KeyRow",
    "ParsedLoRA",
    "load_lora",
]
