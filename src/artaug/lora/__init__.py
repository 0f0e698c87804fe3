"""LoRAs as values: load, scale, add, compress, save in every format, and bake into a checkpoint."""

from artaug.lora.lora import LoRA, LowRank

__all__ = ["LoRA", "LowRank"]
