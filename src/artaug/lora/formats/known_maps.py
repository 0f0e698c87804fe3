"""The key maps of all families: every linear layer and every convolution by diffusers' and by the original name.

Sources: the original checkpoints as diffusers converts them (``diffusers.loaders.single_file_utils``), and its readers
of LoRA files (``diffusers.loaders.lora_conversion_utils``). The tests compare every table with the layers of the
published models, and every file that artaug writes for them with those readers.
"""

from artaug.lora.formats.flux import FLUX1, FLUX2
from artaug.lora.formats.key_maps import QKV, Format, KeyFormat, KeyMap, KeyRow
from artaug.lora.formats.unets import SD15, SDXL

_JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_TIMESTEP_EMBEDDER = tuple(f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2))

SD3 = KeyMap(
    name="Stable Diffusion 3",
    rows=KeyRow.unchanged(
        *(f"transformer_blocks.{{}}.attn.{name}" for name in _JOINT),
        *(f"transformer_blocks.{{}}.attn2.{name}" for name in _JOINT[:4]),
        *(
            f"transformer_blocks.{{}}.{stream}.{name}"
            for stream in ("ff", "ff_context")
            for name in ("net.0.proj", "net.2")
        ),
        *(f"transformer_blocks.{{}}.{name}.linear" for name in ("norm1", "norm1_context")),
        *_TIMESTEP_EMBEDDER,
        *(f"time_text_embed.text_embedder.linear_{number}" for number in (1, 2)),
        "context_embedder",
        "pos_embed.proj",
        "norm_out.linear",
        "proj_out",
    ),
    key_formats={Format.PEFT: KeyFormat.peft("transformer")},
)
"""Stable Diffusion 3 and 3.5."""

QWEN_IMAGE = KeyMap(
    name="Qwen-Image",
    rows=KeyRow.unchanged(
        *(f"transformer_blocks.{{}}.attn.{name}" for name in _JOINT),
        *(
            f"transformer_blocks.{{}}.{stream}_{name}"
            for stream in ("img", "txt")
            for name in ("mlp.net.0.proj", "mlp.net.2", "mod.1")
        ),
        *_TIMESTEP_EMBEDDER,
        "img_in",
        "txt_in",
        "norm_out.linear",
        "proj_out",
    ),
    key_formats={
        Format.PEFT: KeyFormat.peft("transformer"),
        Format.KOHYA: KeyFormat.kohya(),
        Format.COMFYUI: KeyFormat.comfyui(),
        Format.DIFFSYNTH: KeyFormat.diffsynth(),
    },
)
"""Qwen-Image."""

_Z_BLOCKS = ("layers.{}", "noise_refiner.{}", "context_refiner.{}")

Z_IMAGE = KeyMap(
    name="Z-Image",
    rows=(
        *(
            KeyRow(f"{block}.attention.qkv", tuple(f"{block}.attention.to_{part}" for part in "qkv"), QKV)
            for block in _Z_BLOCKS
        ),
        *(KeyRow(f"{block}.attention.out", (f"{block}.attention.to_out.0",)) for block in _Z_BLOCKS),
        *KeyRow.unchanged(
            *(f"{block}.feed_forward.w{number}" for block in _Z_BLOCKS for number in (1, 2, 3)),
            *(f"{block}.adaLN_modulation.0" for block in _Z_BLOCKS[:2]),
            "all_x_embedder.2-1",
            "all_final_layer.2-1.linear",
            "all_final_layer.2-1.adaLN_modulation.1",
            "cap_embedder.1",
            "t_embedder.mlp.0",
            "t_embedder.mlp.2",
        ),
    ),
    key_formats={
        Format.PEFT: KeyFormat.peft("transformer"),
        Format.KOHYA: KeyFormat.kohya(),
        Format.COMFYUI: KeyFormat.comfyui(),
        Format.DIFFSYNTH: KeyFormat.diffsynth(),
    },
)
"""Z-Image."""

KEY_MAPS: tuple[KeyMap, ...] = (FLUX1, FLUX2, SD3, SDXL, SD15, QWEN_IMAGE, Z_IMAGE)
"""The families whose files can be read and written."""
