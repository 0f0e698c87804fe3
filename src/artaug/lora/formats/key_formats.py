"""Short ways to write the tables down."""

from collections.abc import Mapping, Sequence

from artaug.lora.formats.key_maps import KeyFormat, KeyRow

QKV = (1, 1, 1)
"""Queries, keys and values, fused."""
BARE = KeyFormat("", ".lora_A.default.weight", ".lora_B.default.weight")
"""As DiffSynth-Studio writes files of models that it does not rebuild."""
IN_COMFYUI = KeyFormat("diffusion_model.", ".lora_A.weight", ".lora_B.weight")
"""As ComfyUI reads models whose layers diffusers did not rename."""


def in_peft(module: str) -> KeyFormat:
    """As diffusers writes the files of a pipeline whose denoiser is its part ``module``."""
    return KeyFormat(f"{module}.", ".lora_A.weight", ".lora_B.weight")


def in_kohya(*, original_names: bool = False, uniform_rank: bool = False, unsupported: Sequence[str] = ()) -> KeyFormat:
    """As sd-scripts does, training the original model or diffusers' own."""
    return KeyFormat(
        "lora_unet_",
        ".lora_down.weight",
        ".lora_up.weight",
        original_names,
        flat=True,
        alpha=True,
        uniform_rank=uniform_rank,
        unsupported=frozenset(unsupported),
    )


def same(*names: str) -> tuple[KeyRow, ...]:
    """Layers that keep their names."""
    return tuple(KeyRow(name, (name,)) for name in names)


def renamed(original: str, diffusers: str, pairs: Mapping[str, str]) -> tuple[KeyRow, ...]:
    """Layers that have one name there and one here, below a block."""
    return tuple(KeyRow(f"{original}.{one}", (f"{diffusers}.{other}",)) for one, other in pairs.items())
