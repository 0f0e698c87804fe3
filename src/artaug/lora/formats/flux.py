"""The tables of FLUX.1 and FLUX.2."""

from fractions import Fraction

from artaug.lora.formats.key_formats import QKV, in_kohya, in_peft, renamed
from artaug.lora.formats.key_maps import Format, KeyFormat, KeyMap, KeyRow


def _double_attention() -> tuple[KeyRow, ...]:
    block, there = "transformer_blocks.{}.attn", "double_blocks.{}"
    return (
        KeyRow(f"{there}.img_attn.qkv", tuple(f"{block}.to_{one}" for one in "qkv"), QKV),
        KeyRow(f"{there}.txt_attn.qkv", tuple(f"{block}.add_{one}_proj" for one in "qkv"), QKV),
        KeyRow(f"{there}.img_attn.proj", (f"{block}.to_out.0",)),
        KeyRow(f"{there}.txt_attn.proj", (f"{block}.to_add_out",)),
    )


def _double_mlp(first: str, second: str, widened: tuple[Fraction, Fraction]) -> tuple[KeyRow, ...]:
    block, there = "transformer_blocks.{}", "double_blocks.{}"
    return tuple(
        KeyRow(f"{there}.{stream}_mlp.{number}", (f"{block}.{diffusers}.{name}",), aspect=aspect)
        for stream, diffusers in (("img", "ff"), ("txt", "ff_context"))
        for number, name, aspect in ((0, first, widened[0]), (2, second, widened[1]))
    )


def _ends(embed: str, *parts: tuple[str, str]) -> tuple[KeyRow, ...]:
    """What stands before and after the blocks of FLUX."""
    return (
        KeyRow("img_in", ("x_embedder",)),
        KeyRow("txt_in", ("context_embedder",)),
        *(
            KeyRow(f"{there}.{layer}_layer", (f"{embed}.{here}.linear_{number}",))
            for there, here in parts
            for number, layer in ((1, "in"), (2, "out"))
        ),
        KeyRow("final_layer.linear", ("proj_out",)),
        KeyRow("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True),  # (shift, scale) there
    )


_SINGLE, _SINGLE_THERE = "single_transformer_blocks.{}", "single_blocks.{}"
_LINEAR1, _LINEAR1_SHARES = (*(f"{_SINGLE}.attn.to_{one}" for one in "qkv"), f"{_SINGLE}.proj_mlp"), (1, 1, 1, 4)

_FLUX1_ENDS = _ends(
    "time_text_embed",
    ("time_in", "timestep_embedder"),
    ("vector_in", "text_embedder"),
    ("guidance_in", "guidance_embedder"),
)
_FLUX1_UNREAD = frozenset(row.original for row in _FLUX1_ENDS)


_DIFFSYNTH, _DOUBLE = "blocks.{}", "transformer_blocks.{}"

_FLUX1_OF_DIFFSYNTH = (
    KeyRow(f"{_DIFFSYNTH}.attn.a_to_qkv", tuple(f"{_DOUBLE}.attn.to_{one}" for one in "qkv"), QKV),
    KeyRow(f"{_DIFFSYNTH}.attn.b_to_qkv", tuple(f"{_DOUBLE}.attn.add_{one}_proj" for one in "qkv"), QKV),
    *renamed(
        _DIFFSYNTH,
        _DOUBLE,
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
    KeyRow(f"{_SINGLE_THERE}.to_qkv_mlp", _LINEAR1, _LINEAR1_SHARES),
    *renamed(_SINGLE_THERE, _SINGLE, {"proj_out": "proj_out", "norm.linear": "norm.linear"}),
    *(
        KeyRow(f"{there}.{2 * number}", (f"time_text_embed.{here}.linear_{number + 1}",))
        for there, here in (
            ("time_embedder.timestep_embedder", "timestep_embedder"),
            ("guidance_embedder.timestep_embedder", "guidance_embedder"),
            ("pooled_text_embedder", "text_embedder"),
        )
        for number in range(2)
    ),
    KeyRow("final_norm_out.linear", ("norm_out.linear",)),  # (scale, shift), as in diffusers
    KeyRow("final_proj_out", ("proj_out",)),
)

FLUX1 = KeyMap(
    name="FLUX.1",
    rows=(
        *_double_attention(),
        *_double_mlp("net.0.proj", "net.2", (Fraction(4), Fraction(1, 4))),
        *renamed(
            "double_blocks.{}",
            "transformer_blocks.{}",
            {"img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear"},
        ),
        KeyRow(f"{_SINGLE_THERE}.linear1", _LINEAR1, _LINEAR1_SHARES, Fraction(7)),
        KeyRow(f"{_SINGLE_THERE}.linear2", (f"{_SINGLE}.proj_out",), aspect=Fraction(1, 5)),
        *renamed(_SINGLE_THERE, _SINGLE, {"modulation.lin": "norm.linear"}),
        *_FLUX1_ENDS,
    ),
    key_formats={
        Format.PEFT: in_peft("transformer"),
        # diffusers converts the ends too, but leaves out the prefix its own loader asks for, and drops them
        Format.KOHYA: in_kohya(original_names=True, unsupported=tuple(_FLUX1_UNREAD)),
        Format.COMFYUI: KeyFormat(
            "diffusion_model.",
            ".lora_down.weight",
            ".lora_up.weight",
            original_names=True,
            alpha=True,
            unsupported=_FLUX1_UNREAD,
        ),
    },
    aliases=_FLUX1_OF_DIFFSYNTH,  # where ArtAug comes from
)
"""FLUX.1, dev and schnell."""

_FLUX2_STREAMS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
_FLUX2_SWAPPED = "final_layer.adaLN_modulation.1"

FLUX2 = KeyMap(
    name="FLUX.2",
    rows=(
        *_double_attention(),
        *_double_mlp("linear_in", "linear_out", (Fraction(6), Fraction(1, 3))),
        KeyRow(f"{_SINGLE_THERE}.linear1", (f"{_SINGLE}.attn.to_qkv_mlp_proj",), aspect=Fraction(9)),
        KeyRow(f"{_SINGLE_THERE}.linear2", (f"{_SINGLE}.attn.to_out",), aspect=Fraction(1, 4)),
        *(KeyRow(f"{name}.lin", (f"{name}.linear",)) for name in _FLUX2_STREAMS),
        *_ends("time_guidance_embed", ("time_in", "timestep_embedder"), ("guidance_in", "guidance_embedder")),
    ),
    key_formats={
        Format.PEFT: in_peft("transformer"),
        Format.KOHYA: in_kohya(
            original_names=True,
            unsupported=(
                *(f"{name}.lin" for name in _FLUX2_STREAMS),
                "guidance_in.in_layer",
                "guidance_in.out_layer",
                _FLUX2_SWAPPED,
            ),
        ),
        # diffusers swaps the halves of this layer in a checkpoint and not in a LoRA: they cannot both be right
        Format.COMFYUI: KeyFormat(
            "diffusion_model.",
            ".lora_A.weight",
            ".lora_B.weight",
            original_names=True,
            unsupported=frozenset({_FLUX2_SWAPPED}),
        ),
    },
)
"""FLUX.2, dev and klein."""
