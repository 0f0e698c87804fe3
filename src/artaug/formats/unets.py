"""The tables of Stable Diffusion's U-Nets."""

from artaug.formats.naming import Format, Naming, Row
from artaug.formats.shorthand import in_kohya, in_peft

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
    spellings={Format.PEFT: in_peft("unet"), Format.KOHYA: in_kohya(original=True, uniform=True)},
)
"""Stable Diffusion XL."""

SD15 = Naming(
    name="Stable Diffusion 1.5",
    rows=_unet(),
    # sd-scripts trains SDXL on the original U-Net, and this one on diffusers'
    spellings={Format.PEFT: in_peft("unet"), Format.KOHYA: in_kohya(uniform=True)},
)
"""Stable Diffusion 1.x, and 2.x."""
