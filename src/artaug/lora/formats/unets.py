"""The key maps of Stable Diffusion's U-Nets."""

from artaug.lora.formats.key_maps import Format, KeyFormat, KeyMap, KeyRow

_ATTENTION = tuple(f"attn{number}.{name}" for number in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0"))
_LINEAR = tuple(f"transformer_blocks.{{}}.{name}" for name in (*_ATTENTION, "ff.net.0.proj", "ff.net.2"))
_IN_TRANSFORMER = {name: name for name in (*_LINEAR, "proj_in", "proj_out")}
_IN_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE_BLOCKS = {
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
    rows = [KeyRow(original, (diffusers,)) for original, diffusers in _OUTSIDE_BLOCKS.items()]
    for diffusers, original in (down | up).items():
        rows += KeyRow.renamed(f"{original}.1", diffusers.format(kind="attentions"), _IN_TRANSFORMER)
        rows += KeyRow.renamed(f"{original}.0", diffusers.format(kind="resnets"), _IN_RESNET)
    rows += KeyRow.renamed("middle_block.1", "mid_block.attentions.0", _IN_TRANSFORMER)
    for number in range(2):
        rows += KeyRow.renamed(f"middle_block.{2 * number}", f"mid_block.resnets.{number}", _IN_RESNET)
    for block in range(3):
        # the original counts the modules of a block: a residual block, attention if there is any, the upsampler
        upsampler = 2 if block or attention_at_lowest_resolution else 1
        rows.append(KeyRow(f"input_blocks.{3 * block + 3}.0.op", (f"down_blocks.{block}.downsamplers.0.conv",)))
        rows.append(
            KeyRow(f"output_blocks.{3 * block + 2}.{upsampler}.conv", (f"up_blocks.{block}.upsamplers.0.conv",))
        )
    return tuple(rows)


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
)
"""Stable Diffusion XL."""

SD15 = KeyMap(
    name="Stable Diffusion 1.5",
    rows=_unet(attention_at_lowest_resolution=False),
    # sd-scripts trains SDXL on the original U-Net, and this one on diffusers'
    key_formats={Format.PEFT: KeyFormat.peft("unet"), Format.KOHYA: KeyFormat.kohya(uniform_rank=True)},
)
"""Stable Diffusion 1.x, and 2.x."""
