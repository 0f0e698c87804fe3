"""The key maps of all families: every linear layer and every convolution by diffusers' and by the original name.

Sources: the original checkpoints as diffusers converts them (``diffusers.loaders.single_file_utils``), and its readers
of LoRA files (``diffusers.loaders.lora_conversion_utils``). The tests compare every table with the layers of the
published models, and every file that artaug writes for them with those readers.
"""

from fractions import Fraction

from artaug.lora.formats.key_maps import QKV, Format, KeyFormat, KeyMap, KeyRow

# FLUX.1 and FLUX.2: what they have in common

_FLUX_DOUBLE, _FLUX_DOUBLE_ORIGINAL = "transformer_blocks.{}", "double_blocks.{}"
_FLUX_SINGLE, _FLUX_SINGLE_ORIGINAL = "single_transformer_blocks.{}", "single_blocks.{}"
_FLUX_IMAGE_QKV = tuple(f"{_FLUX_DOUBLE}.attn.to_{part}" for part in "qkv")
_FLUX_TEXT_QKV = tuple(f"{_FLUX_DOUBLE}.attn.add_{part}_proj" for part in "qkv")
_FLUX_ATTENTION = (
    KeyRow(f"{_FLUX_DOUBLE_ORIGINAL}.img_attn.qkv", _FLUX_IMAGE_QKV, QKV),
    KeyRow(f"{_FLUX_DOUBLE_ORIGINAL}.txt_attn.qkv", _FLUX_TEXT_QKV, QKV),
    KeyRow(f"{_FLUX_DOUBLE_ORIGINAL}.img_attn.proj", (f"{_FLUX_DOUBLE}.attn.to_out.0",)),
    KeyRow(f"{_FLUX_DOUBLE_ORIGINAL}.txt_attn.proj", (f"{_FLUX_DOUBLE}.attn.to_add_out",)),
)


def _flux_mlp(first: str, second: str, aspects: tuple[Fraction, Fraction]) -> tuple[KeyRow, ...]:
    """The two layers of each double block's MLPs, with their outputs over their inputs."""
    return tuple(
        KeyRow(f"{_FLUX_DOUBLE_ORIGINAL}.{stream}_mlp.{number}", (f"{_FLUX_DOUBLE}.{module}.{name}",), aspect=aspect)
        for stream, module in (("img", "ff"), ("txt", "ff_context"))
        for number, name, aspect in ((0, first, aspects[0]), (2, second, aspects[1]))
    )


def _flux_outside_blocks(embed: str, *embedders: tuple[str, str]) -> tuple[KeyRow, ...]:
    """The layers before and after the blocks; ``embedders`` pairs original names with diffusers' names."""
    return (
        KeyRow("img_in", ("x_embedder",)),
        KeyRow("txt_in", ("context_embedder",)),
        *(
            KeyRow(f"{original}.{layer}_layer", (f"{embed}.{diffusers}.linear_{number}",))
            for original, diffusers in embedders
            for number, layer in ((1, "in"), (2, "out"))
        ),
        KeyRow("final_layer.linear", ("proj_out",)),
        # the original holds (shift, scale), diffusers (scale, shift)
        KeyRow("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),
    )


# FLUX.1

# one layer makes queries, keys, values and the hidden layer of the MLP, which is four times as wide
_FLUX1_LINEAR1, _FLUX1_LINEAR1_SIZES = (
    (*(f"{_FLUX_SINGLE}.attn.to_{part}" for part in "qkv"), f"{_FLUX_SINGLE}.proj_mlp"),
    (1, 1, 1, 4),
)

_FLUX1_OUTSIDE = _flux_outside_blocks(
    "time_text_embed",
    ("time_in", "timestep_embedder"),
    ("vector_in", "text_embedder"),
    ("guidance_in", "guidance_embedder"),
)
_FLUX1_UNSUPPORTED = frozenset(row.original for row in _FLUX1_OUTSIDE)

_FLUX1_DIFFSYNTH_DOUBLE = "blocks.{}"
_FLUX1_DIFFSYNTH = (
    KeyRow(f"{_FLUX1_DIFFSYNTH_DOUBLE}.attn.a_to_qkv", _FLUX_IMAGE_QKV, QKV),
    KeyRow(f"{_FLUX1_DIFFSYNTH_DOUBLE}.attn.b_to_qkv", _FLUX_TEXT_QKV, QKV),
    *KeyRow.renamed(
        _FLUX1_DIFFSYNTH_DOUBLE,
        _FLUX_DOUBLE,
        {
            "attn.a_to_out": "attn.to_out.0",
            "attn.b_to_out": "attn.to_add_out",
            "ff_a.0": "ff.net.0.proj",
            "ff_a.2": "ff.net.2",
            "ff_b.0": "ff_context.net.0.proj",
            "ff_b.2": "ff_context.net.2",
            "norm1_a.linear": "norm1.linear",
            "norm1_b.linear": "norm1_context.linear",
        },
    ),
    KeyRow(f"{_FLUX_SINGLE_ORIGINAL}.to_qkv_mlp", _FLUX1_LINEAR1, _FLUX1_LINEAR1_SIZES),
    *KeyRow.renamed(_FLUX_SINGLE_ORIGINAL, _FLUX_SINGLE, {"proj_out": "proj_out", "norm.linear": "norm.linear"}),
    *(
        KeyRow(f"{original}.{2 * number}", (f"time_text_embed.{diffusers}.linear_{number + 1}",))
        for original, diffusers in (
            ("time_embedder.timestep_embedder", "timestep_embedder"),
            ("guidance_embedder.timestep_embedder", "guidance_embedder"),
            ("pooled_text_embedder", "text_embedder"),
        )
        for number in range(2)
    ),
    # DiffSynth-Studio renames the original checkpoint's layers and leaves their rows as they are: (shift, scale)
    KeyRow("final_norm_out.linear", ("norm_out.linear",), swapped=True),
    KeyRow("final_proj_out", ("proj_out",)),
)

FLUX1 = KeyMap(
    name="FLUX.1",
    rows=(
        *_FLUX_ATTENTION,
        *_flux_mlp("net.0.proj", "net.2", (Fraction(4), Fraction(1, 4))),
        *KeyRow.renamed(
            _FLUX_DOUBLE_ORIGINAL,
            _FLUX_DOUBLE,
            {"img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear"},
        ),
        KeyRow(f"{_FLUX_SINGLE_ORIGINAL}.linear1", _FLUX1_LINEAR1, _FLUX1_LINEAR1_SIZES, Fraction(7)),
        KeyRow(f"{_FLUX_SINGLE_ORIGINAL}.linear2", (f"{_FLUX_SINGLE}.proj_out",), aspect=Fraction(1, 5)),
        *KeyRow.renamed(_FLUX_SINGLE_ORIGINAL, _FLUX_SINGLE, {"modulation.lin": "norm.linear"}),
        *_FLUX1_OUTSIDE,
    ),
    key_formats={
        Format.PEFT: KeyFormat.peft("transformer"),
        # diffusers converts the layers outside the blocks without the prefix that its own loader expects, and drops them
        Format.KOHYA: KeyFormat.kohya(original_names=True, unsupported=_FLUX1_UNSUPPORTED),
        Format.COMFYUI: KeyFormat(
            "diffusion_model.",
            ".lora_down.weight",
            ".lora_up.weight",
            original_names=True,
            alpha=True,
            unsupported=_FLUX1_UNSUPPORTED,
        ),
    },
    aliases=_FLUX1_DIFFSYNTH,  # ArtAug's authors published their LoRA in these names
)
"""FLUX.1, dev and schnell."""

# FLUX.2

_FLUX2_STREAMS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
_FLUX2_SWAPPED = "final_layer.adaLN_modulation.1"

FLUX2 = KeyMap(
    name="FLUX.2",
    rows=(
        *_FLUX_ATTENTION,
        *_flux_mlp("linear_in", "linear_out", (Fraction(6), Fraction(1, 3))),
        KeyRow(f"{_FLUX_SINGLE_ORIGINAL}.linear1", (f"{_FLUX_SINGLE}.attn.to_qkv_mlp_proj",), aspect=Fraction(9)),
        KeyRow(f"{_FLUX_SINGLE_ORIGINAL}.linear2", (f"{_FLUX_SINGLE}.attn.to_out",), aspect=Fraction(1, 4)),
        *(KeyRow(f"{name}.lin", (f"{name}.linear",)) for name in _FLUX2_STREAMS),
        *_flux_outside_blocks(
            "time_guidance_embed", ("time_in", "timestep_embedder"), ("guidance_in", "guidance_embedder")
        ),
    ),
    key_formats={
        Format.PEFT: KeyFormat.peft("transformer"),
        Format.KOHYA: KeyFormat.kohya(
            original_names=True,
            unsupported=(
                *(f"{name}.lin" for name in _FLUX2_STREAMS),
                "guidance_in.in_layer",
                "guidance_in.out_layer",
                _FLUX2_SWAPPED,
            ),
        ),
        # diffusers swaps the halves of this layer in a checkpoint and not in a LoRA: one of the two must be wrong
        Format.COMFYUI: KeyFormat.comfyui(original_names=True, unsupported={_FLUX2_SWAPPED}),
        Format.DIFFSYNTH: KeyFormat.diffsynth(),
    },
)
"""FLUX.2, dev and klein."""

# Stable Diffusion 3

_SD3_BLOCK, _SD3_BLOCK_ORIGINAL = "transformer_blocks.{}", "joint_blocks.{}"
_SD3_STREAMS = (("x_block", "ff", "to_out.0"), ("context_block", "ff_context", "to_add_out"))

SD3 = KeyMap(
    name="Stable Diffusion 3",
    rows=(
        *(
            KeyRow(f"{_SD3_BLOCK_ORIGINAL}.{original}.qkv", tuple(f"{_SD3_BLOCK}.{path.format(p)}" for p in "qkv"), QKV)
            for original, path in (
                ("x_block.attn", "attn.to_{}"),
                ("x_block.attn2", "attn2.to_{}"),
                ("context_block.attn", "attn.add_{}_proj"),
            )
        ),
        KeyRow(f"{_SD3_BLOCK_ORIGINAL}.x_block.attn2.proj", (f"{_SD3_BLOCK}.attn2.to_out.0",)),
        *(
            row
            for stream, mlp, output in _SD3_STREAMS
            for row in KeyRow.renamed(
                f"{_SD3_BLOCK_ORIGINAL}.{stream}",
                _SD3_BLOCK,
                {"attn.proj": f"attn.{output}", "mlp.fc1": f"{mlp}.net.0.proj", "mlp.fc2": f"{mlp}.net.2"},
            )
        ),
        KeyRow(f"{_SD3_BLOCK_ORIGINAL}.x_block.adaLN_modulation.1", (f"{_SD3_BLOCK}.norm1.linear",)),
        # the last block modulates the text by two vectors in place of six: (shift, scale), in diffusers (scale, shift)
        KeyRow(
            f"{_SD3_BLOCK_ORIGINAL}.context_block.adaLN_modulation.1",
            (f"{_SD3_BLOCK}.norm1_context.linear",),
            swapped=True,
            swapped_aspect=Fraction(2),
        ),
        *(
            KeyRow(f"{original}.mlp.{2 * number}", (f"time_text_embed.{diffusers}.linear_{number + 1}",))
            for original, diffusers in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder"))
            for number in range(2)
        ),
        *KeyRow.unchanged("context_embedder"),
        KeyRow("x_embedder.proj", ("pos_embed.proj",)),
        KeyRow("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),  # (shift, scale)
        KeyRow("final_layer.linear", ("proj_out",)),
    ),
    key_formats={
        Format.PEFT: KeyFormat.peft("transformer"),
        Format.KOHYA: KeyFormat.kohya(original_names=True),
        Format.COMFYUI: KeyFormat.comfyui(original_names=True),
    },
)
"""Stable Diffusion 3 and 3.5."""

# Qwen-Image

_QWEN_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

QWEN_IMAGE = KeyMap(
    name="Qwen-Image",
    rows=KeyRow.unchanged(
        *(f"transformer_blocks.{{}}.attn.{name}" for name in _QWEN_ATTENTION),
        *(
            f"transformer_blocks.{{}}.{stream}_{name}"
            for stream in ("img", "txt")
            for name in ("mlp.net.0.proj", "mlp.net.2", "mod.1")
        ),
        *(f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2)),
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

# Z-Image

_Z_BLOCKS = ("layers.{}", "noise_refiner.{}", "context_refiner.{}")
_Z_PATCHES = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
}

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
            "cap_embedder.1",
            "t_embedder.mlp.0",
            "t_embedder.mlp.2",
        ),
        *(KeyRow(original, (diffusers,)) for original, diffusers in _Z_PATCHES.items()),
    ),
    key_formats={
        Format.PEFT: KeyFormat.peft("transformer"),
        # ComfyUI looks for the layers' original names here, and diffusers, which reads both, loses the patches' layers
        Format.KOHYA: KeyFormat.kohya(original_names=True, unsupported=_Z_PATCHES),
        Format.COMFYUI: KeyFormat.comfyui(),
        Format.DIFFSYNTH: KeyFormat.diffsynth(),
    },
)
"""Z-Image."""

# Stable Diffusion's U-Nets: what they have in common

_UNET_ATTENTION = tuple(f"attn{number}.{name}" for number in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0"))
_UNET_LINEAR = tuple(f"transformer_blocks.{{}}.{name}" for name in (*_UNET_ATTENTION, "ff.net.0.proj", "ff.net.2"))
_UNET_TRANSFORMER = {name: name for name in (*_UNET_LINEAR, "proj_in", "proj_out")}
_UNET_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_OUTSIDE_BLOCKS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
}


def _unet(*, attention_at_lowest_resolution: bool) -> tuple[KeyRow, ...]:
    """A U-Net of two layers a block: the original numbers all layers, diffusers numbers blocks and layers in them."""
    down = {
        f"down_blocks.{block}.{{kind}}.{layer}": f"input_blocks.{3 * block + layer + 1}"
        for block in range(4)
        for layer in range(2)
    }
    up = {
        f"up_blocks.{block}.{{kind}}.{layer}": f"output_blocks.{3 * block + layer}"
        for block in range(4)
        for layer in range(3)
    }
    rows = [KeyRow(original, (diffusers,)) for original, diffusers in _UNET_OUTSIDE_BLOCKS.items()]
    for diffusers, original in (down | up).items():
        rows += KeyRow.renamed(f"{original}.1", diffusers.format(kind="attentions"), _UNET_TRANSFORMER)
        rows += KeyRow.renamed(f"{original}.0", diffusers.format(kind="resnets"), _UNET_RESNET)
    rows += KeyRow.renamed("middle_block.1", "mid_block.attentions.0", _UNET_TRANSFORMER)
    for number in range(2):
        rows += KeyRow.renamed(f"middle_block.{2 * number}", f"mid_block.resnets.{number}", _UNET_RESNET)
    for block in range(3):
        # the original counts the modules of a block: a residual block, attention if there is any, the upsampler
        upsampler = 2 if block or attention_at_lowest_resolution else 1
        rows.append(KeyRow(f"input_blocks.{3 * block + 3}.0.op", (f"down_blocks.{block}.downsamplers.0.conv",)))
        rows.append(
            KeyRow(f"output_blocks.{3 * block + 2}.{upsampler}.conv", (f"up_blocks.{block}.upsamplers.0.conv",))
        )
    return tuple(rows)


# Stable Diffusion XL

SDXL = KeyMap(
    name="Stable Diffusion XL",
    rows=(
        *_unet(attention_at_lowest_resolution=True),
        *(KeyRow(f"label_emb.0.{2 * number}", (f"add_embedding.linear_{number + 1}",)) for number in range(2)),
    ),
    key_formats={
        Format.PEFT: KeyFormat.peft("unet"),
        Format.KOHYA: KeyFormat.kohya(original_names=True, uniform_rank=True),
    },
    default_format=Format.KOHYA,  # of a PEFT file ComfyUI drops the attention
)
"""Stable Diffusion XL."""

# Stable Diffusion 1.5

SD15 = KeyMap(
    name="Stable Diffusion 1.5",
    rows=_unet(attention_at_lowest_resolution=False),
    # sd-scripts trains SDXL on the original U-Net, and this one on diffusers'
    key_formats={Format.PEFT: KeyFormat.peft("unet"), Format.KOHYA: KeyFormat.kohya(uniform_rank=True)},
    default_format=Format.KOHYA,  # of a PEFT file ComfyUI drops the attention
)
"""Stable Diffusion 1.x, and 2.x."""

# All

KEY_MAPS: tuple[KeyMap, ...] = (FLUX1, FLUX2, SD3, SDXL, SD15, QWEN_IMAGE, Z_IMAGE)
"""The families whose files can be read and written."""
