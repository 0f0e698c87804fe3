"""The tables of Stable Diffusion's U-Nets."""

from collections.abc import Iterator

from artaug.lora.formats.key_formats import in_kohya, in_peft
from artaug.lora.formats.key_maps import Format, KeyMap, KeyRow

_ATTENTION = tuple(f"attn{number}.{name}" for number in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0"))
_IN_TRANSFORMER = (
    *(f"transformer_blocks.{{}}.{name}" for name in (*_ATTENTION, "ff.net.0.proj", "ff.net.2")),
    "proj_in",
    "proj_out",
)
_IN_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
}


def _unet(*, attention_at_the_bottom: bool) -> tuple[KeyRow, ...]:
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
    rows = [KeyRow(original, (diffusers,)) for original, diffusers in _OUTSIDE.items()]
    for diffusers, original in (down | up).items():
        rows += _transformer(diffusers.format(kind="attentions"), f"{original}.1")
        rows += _resnet(diffusers.format(kind="resnets"), f"{original}.0")
    rows += _transformer("mid_block.attentions.0", "middle_block.1")
    for number in range(2):
        rows += _resnet(f"mid_block.resnets.{number}", f"middle_block.{2 * number}")
    for block in range(3):
        behind = 2 if block or attention_at_the_bottom else 1
        rows.append(KeyRow(f"input_blocks.{3 * block + 3}.0.op", (f"down_blocks.{block}.downsamplers.0.conv",)))
        rows.append(KeyRow(f"output_blocks.{3 * block + 2}.{behind}.conv", (f"up_blocks.{block}.upsamplers.0.conv",)))
    return tuple(rows)


def _transformer(diffusers: str, original: str) -> Iterator[KeyRow]:
    return (KeyRow(f"{original}.{name}", (f"{diffusers}.{name}",)) for name in _IN_TRANSFORMER)


def _resnet(diffusers: str, original: str) -> Iterator[KeyRow]:
    return (KeyRow(f"{original}.{key}", (f"{diffusers}.{name}",)) for key, name in _IN_RESNET.items())


SDXL = KeyMap(
    name="Stable Diffusion XL",
    rows=(
        *_unet(attention_at_the_bottom=True),
        *(KeyRow(f"label_emb.0.{2 * number}", (f"add_embedding.linear_{number + 1}",)) for number in range(2)),
    ),
    key_formats={Format.PEFT: in_peft("unet"), Format.KOHYA: in_kohya(original_names=True, uniform_rank=True)},
)
"""Stable Diffusion XL."""

SD15 = KeyMap(
    name="Stable Diffusion 1.5",
    rows=_unet(attention_at_the_bottom=False),
    # sd-scripts trains SDXL on the original U-Net, and this one on diffusers'
    key_formats={Format.PEFT: in_peft("unet"), Format.KOHYA: in_kohya(uniform_rank=True)},
)
"""Stable Diffusion 1.x, and 2.x."""
