"""The key maps of FLUX.1 and FLUX.2."""

from fractions import Fraction

from artaug.lora.formats.key_maps import QKV, Format, KeyFormat, KeyMap, KeyRow

_DOUBLE, _DOUBLE_ORIGINAL = "transformer_blocks.{}", "double_blocks.{}"
_SINGLE, _SINGLE_ORIGINAL = "single_transformer_blocks.{}", "single_blocks.{}"
_IMAGE_QKV = tuple(f"{_DOUBLE}.attn.to_{part}" for part in "qkv")
_TEXT_QKV = tuple(f"{_DOUBLE}.attn.add_{part}_proj" for part in "qkv")
_ATTENTION = (
    KeyRow(f"{_DOUBLE_ORIGINAL}.img_attn.qkv", _IMAGE_QKV, QKV),
    KeyRow(f"{_DOUBLE_ORIGINAL}.txt_attn.qkv", _TEXT_QKV, QKV),
    KeyRow(f"{_DOUBLE_ORIGINAL}.img_attn.proj", (f"{_DOUBLE}.attn.to_out.0",)),
    KeyRow(f"{_DOUBLE_ORIGINAL}.txt_attn.proj", (f"{_DOUBLE}.attn.to_add_out",)),
)


def _mlp(first: str, second: str, aspects: tuple[Fraction, Fraction]) -> tuple[KeyRow, ...]:
    """The two layers of each double block's MLPs, with their outputs over their inputs."""
    return tuple(
        KeyRow(f"{_DOUBLE_ORIGINAL}.{stream}_mlp.{number}", (f"{_DOUBLE}.{module}.{name}",), aspect=aspect)
        for stream, module in (("img", "ff"), ("txt", "ff_context"))
        for number, name, aspect in ((0, first, aspects[0]), (2, second, aspects[1]))
    )


def _outside_blocks(embed: str, *embedders: tuple[str, str]) -> tuple[KeyRow, ...]:
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


# one layer makes queries, keys, values and the hidden layer of the MLP, which is four times as wide
_LINEAR1, _LINEAR1_SIZES = (*(f"{_SINGLE}.attn.to_{part}" for part in "qkv"), f"{_SINGLE}.proj_mlp"), (1, 1, 1, 4)

_FLUX1_OUTSIDE = _outside_blocks(
    "time_text_embed",
    ("time_in", "timestep_embedder"),
    ("vector_in", "text_embedder"),
    ("guidance_in", "guidance_embedder"),
)
_FLUX1_UNSUPPORTED = frozenset(row.original for row in _FLUX1_OUTSIDE)

_DIFFSYNTH_DOUBLE = "blocks.{}"
_FLUX1_DIFFSYNTH = (
    KeyRow(f"{_DIFFSYNTH_DOUBLE}.attn.a_to_qkv", _IMAGE_QKV, QKV),
    KeyRow(f"{_DIFFSYNTH_DOUBLE}.attn.b_to_qkv", _TEXT_QKV, QKV),
    *KeyRow.renamed(
        _DIFFSYNTH_DOUBLE,
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
    KeyRow(f"{_SINGLE_ORIGINAL}.to_qkv_mlp", _LINEAR1, _LINEAR1_SIZES),
    *KeyRow.renamed(_SINGLE_ORIGINAL, _SINGLE, {"proj_out": "proj_out", "norm.linear": "norm.linear"}),
    *(
        KeyRow(f"{original}.{2 * number}", (f"time_text_embed.{diffusers}.linear_{number + 1}",))
        for original, diffusers in (
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
        *_ATTENTION,
        *_mlp("net.0.proj", "net.2", (Fraction(4), Fraction(1, 4))),
        *KeyRow.renamed(
            _DOUBLE_ORIGINAL,
            _DOUBLE,
            {"img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear"},
        ),
        KeyRow(f"{_SINGLE_ORIGINAL}.linear1", _LINEAR1, _LINEAR1_SIZES, Fraction(7)),
        KeyRow(f"{_SINGLE_ORIGINAL}.linear2", (f"{_SINGLE}.proj_out",), aspect=Fraction(1, 5)),
        *KeyRow.renamed(_SINGLE_ORIGINAL, _SINGLE, {"modulation.lin": "norm.linear"}),
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

_FLUX2_STREAMS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
_FLUX2_SWAPPED = "final_layer.adaLN_modulation.1"

FLUX2 = KeyMap(
    name="FLUX.2",
    rows=(
        *_ATTENTION,
        *_mlp("linear_in", "linear_out", (Fraction(6), Fraction(1, 3))),
        KeyRow(f"{_SINGLE_ORIGINAL}.linear1", (f"{_SINGLE}.attn.to_qkv_mlp_proj",), aspect=Fraction(9)),
        KeyRow(f"{_SINGLE_ORIGINAL}.linear2", (f"{_SINGLE}.attn.to_out",), aspect=Fraction(1, 4)),
        *(KeyRow(f"{name}.lin", (f"{name}.linear",)) for name in _FLUX2_STREAMS),
        *_outside_blocks("time_guidance_embed", ("time_in", "timestep_embedder"), ("guidance_in", "guidance_embedder")),
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
    },
)
"""FLUX.2, dev and klein."""
