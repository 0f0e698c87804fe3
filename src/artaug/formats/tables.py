"""The tables: every linear layer of every family, by both its names.

Sources: the original checkpoints as diffusers converts them (``diffusers.loaders.single_file_utils``), and its readers
of LoRA files (``diffusers.loaders.lora_conversion_utils``), against which the tests hold them.
"""

from collections.abc import Sequence
from fractions import Fraction

from artaug.formats.naming import Format, Naming, Row, Spelling

_QKV = (1, 1, 1)


def _peft(module: str) -> Spelling:
    return Spelling(f"{module}.", ".lora_A.weight", ".lora_B.weight")


def _kohya(*, original: bool = False, unread: Sequence[str] = ()) -> Spelling:
    return Spelling(
        "lora_unet_", ".lora_down.weight", ".lora_up.weight", original, flat=True, alpha=True, unread=frozenset(unread)
    )


_BARE = Spelling("", ".lora_A.default.weight", ".lora_B.default.weight")
_COMFYUI = Spelling("diffusion_model.", ".lora_A.weight", ".lora_B.weight")


def _same(*names: str) -> tuple[Row, ...]:
    """Layers that keep their names."""
    return tuple(Row(name, (name,)) for name in names)


def _renamed(theirs: str, ours: str, **pairs: str) -> tuple[Row, ...]:
    return tuple(Row(f"{theirs}.{one.replace('__', '.')}", (f"{ours}.{other}",)) for one, other in pairs.items())


def _double_attention() -> tuple[Row, ...]:
    block, there = "transformer_blocks.{}.attn", "double_blocks.{}"
    return (
        Row(f"{there}.img_attn.qkv", tuple(f"{block}.to_{one}" for one in "qkv"), _QKV),
        Row(f"{there}.txt_attn.qkv", tuple(f"{block}.add_{one}_proj" for one in "qkv"), _QKV),
        Row(f"{there}.img_attn.proj", (f"{block}.to_out.0",)),
        Row(f"{there}.txt_attn.proj", (f"{block}.to_add_out",)),
    )


def _double_mlp(first: str, second: str, widened: tuple[Fraction, Fraction]) -> tuple[Row, ...]:
    block, there = "transformer_blocks.{}", "double_blocks.{}"
    return tuple(
        Row(f"{there}.{stream}_mlp.{number}", (f"{block}.{ours}.{name}",), aspect=aspect)
        for stream, ours in (("img", "ff"), ("txt", "ff_context"))
        for number, name, aspect in ((0, first, widened[0]), (2, second, widened[1]))
    )


def _ends(embed: str, *parts: tuple[str, str]) -> tuple[Row, ...]:
    """What stands before and after the blocks of FLUX."""
    return (
        Row("img_in", ("x_embedder",)),
        Row("txt_in", ("context_embedder",)),
        *(
            Row(f"{there}.{layer}_layer", (f"{embed}.{here}.linear_{number}",))
            for there, here in parts
            for number, layer in ((1, "in"), (2, "out"))
        ),
        Row("final_layer.linear", ("proj_out",)),
        Row("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),  # (shift, scale) there
    )


_SINGLE, _SINGLE_THERE = "single_transformer_blocks.{}", "single_blocks.{}"

_FLUX1_ENDS = _ends(
    "time_text_embed",
    ("time_in", "timestep_embedder"),
    ("vector_in", "text_embedder"),
    ("guidance_in", "guidance_embedder"),
)
_FLUX1_UNREAD = frozenset(row.theirs for row in _FLUX1_ENDS)

FLUX1 = Naming(
    name="FLUX.1",
    rows=(
        *_double_attention(),
        *_double_mlp("net.0.proj", "net.2", (Fraction(4), Fraction(1, 4))),
        *_renamed(
            "double_blocks.{}",
            "transformer_blocks.{}",
            img_mod__lin="norm1.linear",
            txt_mod__lin="norm1_context.linear",
        ),
        Row(
            f"{_SINGLE_THERE}.linear1",
            (*(f"{_SINGLE}.attn.to_{one}" for one in "qkv"), f"{_SINGLE}.proj_mlp"),
            (1, 1, 1, 4),
            Fraction(7),
        ),
        Row(f"{_SINGLE_THERE}.linear2", (f"{_SINGLE}.proj_out",), aspect=Fraction(1, 5)),
        *_renamed(_SINGLE_THERE, _SINGLE, modulation__lin="norm.linear"),
        *_FLUX1_ENDS,
    ),
    spellings={
        Format.PEFT: _peft("transformer"),
        # diffusers converts the ends too, but leaves out the prefix its own loader asks for, and drops them
        Format.KOHYA: _kohya(original=True, unread=tuple(_FLUX1_UNREAD)),
        Format.COMFYUI: Spelling(
            "diffusion_model.",
            ".lora_down.weight",
            ".lora_up.weight",
            original=True,
            alpha=True,
            unread=_FLUX1_UNREAD,
        ),
    },
)
"""FLUX.1, dev and schnell."""

_FLUX2_STREAMS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
_FLUX2_SWAPPED = "final_layer.adaLN_modulation.1"

FLUX2 = Naming(
    name="FLUX.2",
    rows=(
        *_double_attention(),
        *_double_mlp("linear_in", "linear_out", (Fraction(6), Fraction(1, 3))),
        Row(f"{_SINGLE_THERE}.linear1", (f"{_SINGLE}.attn.to_qkv_mlp_proj",), aspect=Fraction(9)),
        Row(f"{_SINGLE_THERE}.linear2", (f"{_SINGLE}.attn.to_out",), aspect=Fraction(1, 4)),
        *(Row(f"{name}.lin", (f"{name}.linear",)) for name in _FLUX2_STREAMS),
        *_ends("time_guidance_embed", ("time_in", "timestep_embedder"), ("guidance_in", "guidance_embedder")),
    ),
    spellings={
        Format.PEFT: _peft("transformer"),
        Format.KOHYA: _kohya(
            original=True,
            unread=(
                *(f"{name}.lin" for name in _FLUX2_STREAMS),
                "guidance_in.in_layer",
                "guidance_in.out_layer",
                _FLUX2_SWAPPED,
            ),
        ),
        # diffusers swaps the halves of this layer in a checkpoint and not in a LoRA: they cannot both be right
        Format.COMFYUI: Spelling(
            "diffusion_model.",
            ".lora_A.weight",
            ".lora_B.weight",
            original=True,
            unread=frozenset({_FLUX2_SWAPPED}),
        ),
    },
)
"""FLUX.2, dev and klein."""

_JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_TIMES = tuple(f"time_text_embed.timestep_embedder.linear_{number}" for number in (1, 2))

SD3 = Naming(
    name="Stable Diffusion 3",
    rows=_same(
        *(f"transformer_blocks.{{}}.attn.{name}" for name in _JOINT),
        *(f"transformer_blocks.{{}}.attn2.{name}" for name in _JOINT[:4]),
        *(
            f"transformer_blocks.{{}}.{stream}.{name}"
            for stream in ("ff", "ff_context")
            for name in ("net.0.proj", "net.2")
        ),
        *(f"transformer_blocks.{{}}.{name}.linear" for name in ("norm1", "norm1_context")),
        *_TIMES,
        *(f"time_text_embed.text_embedder.linear_{number}" for number in (1, 2)),
        "context_embedder",
        "norm_out.linear",
        "proj_out",
    ),
    spellings={Format.PEFT: _peft("transformer")},
)
"""Stable Diffusion 3 and 3.5."""

QWEN_IMAGE = Naming(
    name="Qwen-Image",
    rows=_same(
        *(f"transformer_blocks.{{}}.attn.{name}" for name in _JOINT),
        *(
            f"transformer_blocks.{{}}.{stream}_{name}"
            for stream in ("img", "txt")
            for name in ("mlp.net.0.proj", "mlp.net.2", "mod.1")
        ),
        *_TIMES,
        "img_in",
        "txt_in",
        "norm_out.linear",
        "proj_out",
    ),
    spellings={
        Format.PEFT: _peft("transformer"),
        Format.KOHYA: _kohya(),
        Format.COMFYUI: _COMFYUI,
        Format.DIFFSYNTH: _BARE,
    },
)
"""Qwen-Image."""

_Z_BLOCKS = ("layers.{}", "noise_refiner.{}", "context_refiner.{}")

Z_IMAGE = Naming(
    name="Z-Image",
    rows=(
        *(
            Row(f"{block}.attention.qkv", tuple(f"{block}.attention.to_{one}" for one in "qkv"), _QKV)
            for block in _Z_BLOCKS
        ),
        *(Row(f"{block}.attention.out", (f"{block}.attention.to_out.0",)) for block in _Z_BLOCKS),
        *_same(
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
    spellings={
        Format.PEFT: _peft("transformer"),
        Format.KOHYA: _kohya(),
        Format.COMFYUI: _COMFYUI,
        Format.DIFFSYNTH: _BARE,
    },
)
"""Z-Image."""

_ATTENTION = tuple(f"attn{number}.{name}" for number in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0"))
_IN_TRANSFORMER = (
    *(f"transformer_blocks.{{}}.{name}" for name in (*_ATTENTION, "ff.net.0.proj", "ff.net.2")),
    "proj_in",
    "proj_out",
)


def _unet() -> tuple[Row, ...]:
    """A U-Net of two layers a block: numbered through in the original, by block and layer in diffusers."""
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
    rows = []
    for ours, theirs in (down | up).items():
        attention, resnet = ours.format(kind="attentions"), ours.format(kind="resnets")
        rows += [Row(f"{theirs}.1.{name}", (f"{attention}.{name}",)) for name in _IN_TRANSFORMER]
        rows.append(Row(f"{theirs}.0.emb_layers.1", (f"{resnet}.time_emb_proj",)))
    rows += [Row(f"middle_block.1.{name}", (f"mid_block.attentions.0.{name}",)) for name in _IN_TRANSFORMER]
    rows += [
        Row(f"middle_block.{2 * number}.emb_layers.1", (f"mid_block.resnets.{number}.time_emb_proj",))
        for number in range(2)
    ]
    rows += [Row(f"time_embed.{2 * number}", (f"time_embedding.linear_{number + 1}",)) for number in range(2)]
    return tuple(rows)


SDXL = Naming(
    name="Stable Diffusion XL",
    rows=(
        *_unet(),
        *(Row(f"label_emb.0.{2 * number}", (f"add_embedding.linear_{number + 1}",)) for number in range(2)),
    ),
    spellings={Format.PEFT: _peft("unet"), Format.KOHYA: _kohya(original=True)},
)
"""Stable Diffusion XL."""

SD15 = Naming(
    name="Stable Diffusion 1.5",
    rows=_unet(),
    spellings={Format.PEFT: _peft("unet")},  # kohya names are refused until an independent reader confirms them
)
"""Stable Diffusion 1.x, and 2.x."""

NAMINGS: tuple[Naming, ...] = (FLUX1, FLUX2, SD3, SDXL, SD15, QWEN_IMAGE, Z_IMAGE)
"""The families whose files are known."""
