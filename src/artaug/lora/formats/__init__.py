"""The formats LoRA files come in: one table of names, read and written by one converter.

A LoRA is a mapping from the denoiser's own module paths; a file spells those paths in one of several ways, and fuses
some of the layers. What no reader but artaug's own could confirm is refused by name, not guessed.
"""

from artaug.lora.formats.flux import FLUX1, FLUX2
from artaug.lora.formats.key_maps import Format, KeyMap
from artaug.lora.formats.known_maps import KEY_MAPS, QWEN_IMAGE, SD3, Z_IMAGE
from artaug.lora.formats.reading import ParsedLoRA, read
from artaug.lora.formats.unets import SD15, SDXL

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
    "KeyMap",
    "ParsedLoRA",
    "read",
]
