"""Short ways to write the tables down."""

from collections.abc import Mapping, Sequence

from artaug.lora.formats.key_maps import KeyFormat, Row

QKV = (1, 1, 1)
"""Queries, keys and values, fused."""
BARE = KeyFormat("", ".lora_A.default.weight", ".lora_B.default.weight")
"""As DiffSynth-Studio writes files of models that it does not rebuild."""
IN_COMFYUI = KeyFormat("diffusion_model.", ".lora_A.weight", ".lora_B.weight")
"""As ComfyUI reads models whose layers diffusers did not rename."""


def in_peft(module: str) -> KeyFormat:
    """As diffusers writes the files of a pipeline whose denoiser is its part ``module``."""
    return KeyFormat(f"{module}.", ".lora_A.weight", ".lora_B.weight")


def in_kohya(*, original: bool = False, uniform: bool = False, unread: Sequence[str] = ()) -> KeyFormat:
    """As sd-scripts does, training the original model or diffusers' own."""
    return KeyFormat(
        "lora_unet_",
        ".lora_down.weight",
        ".lora_up.weight",
        original,
        flat=True,
        alpha=True,
        uniform=uniform,
        unread=frozenset(unread),
    )


def same(*names: str) -> tuple[Row, ...]:
    """Layers that keep their names."""
    return tuple(Row(name, (name,)) for name in names)


def renamed(theirs: str, ours: str, pairs: Mapping[str, str]) -> tuple[Row, ...]:
    """Layers that have one name there and one here, below a block."""
    return tuple(Row(f"{theirs}.{one}", (f"{ours}.{other}",)) for one, other in pairs.items())
