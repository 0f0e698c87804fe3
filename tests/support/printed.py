"""Programs of the docs, run as they are printed: behind each of their names on the Hub is a tiny real model.

What a test exchanges beside that it names, and exchanges in the text that is printed.
"""

from pathlib import Path

import huggingface_hub
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel

from support.fences import FENCE
from support.tiny_flux import tiny_flux

ROOT = Path(__file__).parents[2]
FLUX, VLM = "black-forest-labs/FLUX.1-dev", "Qwen/Qwen3-VL-8B-Instruct"
REPLY = (  # its tokens, each of which a JSON grammar allows after the ones before
    '{"summary":"',
    "dull",
    '","suggestions":[{"reason":"',
    "dark",
    '","box":[',
    "0",
    ",0.1,",
    "0.5",
    ',1],"prompt":"',
    "a sunlit window",
    '"}]}',
)


def printed_in(page, test):
    """The fences of a page that say that this test executes them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fences = [match["code"] for match in FENCE.finditer(text) if match["test"] == test]
    assert fences, f"no fence in {page} says that {test} executes it"
    return fences


def run(code, exchanged, **names):
    """Run a program with what is exchanged, and return its names; some it has from the text around it."""
    for printed, instead in exchanged.items():
        assert code.count(printed) == 1, f"there is no {printed!r}, or several"
        code = code.replace(printed, instead)
    names["__name__"] = "__main__"
    exec(compile(code, "program", "exec"), names)
    return names


def place(cache, name):
    """The folder of a model in a cache of the Hub."""
    root, commit = cache / f"models--{name.replace('/', '--')}", "0" * 40
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit, encoding="utf-8")
    return root / "snapshots" / commit


def read_from(cache, monkeypatch):
    """Names on the Hub are looked up in this cache, and nowhere else."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def flux_in_bfloat16():
    """A FLUX with the parts, files and settings of FLUX.1-dev; its autoencoder halves more often, so that 1,024 pixels are few tokens."""
    pipeline = tiny_flux(guidance_embeds=True, dynamic_shift=True)
    levels = 6
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(4,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=2,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        sizes = {"in_channels": 64, "num_single_layers": 1, "num_attention_heads": 1}
        transformer = FluxTransformer2DModel.from_config({**pipeline.transformer.config, **sizes})
    parts = {**pipeline.components, "vae": vae.eval(), "transformer": transformer.eval()}
    return type(pipeline)(**parts).to(torch.bfloat16)
