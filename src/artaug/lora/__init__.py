"""LoRAs as values: load, scale, add, compress, save in every format, and bake into a checkpoint."""

from artaug.lora.formats.key_maps import Format
from artaug.lora.fusing import CompressedLayer, Compression, ConcatFuser, Fuser, SvdFuser
from artaug.lora.lora import LoRA, LowRank

__all__ = ["CompressedLayer", "Compression", "ConcatFuser", "Format", "Fuser", "LoRA", "LowRank", "SvdFuser"]
