"""The dry run: the same protocol on the playground's FLUX and tiny models, all of them in folders and read as real ones are."""

from pathlib import Path

import torch

import artaug as aa
from artaug import playground
from artaug.critics import Coordinates
from artaug.training import DifferentialLoRATrainer
from benchmarks import _on_flux_tiny as tiny
from benchmarks._on_flux_models import Sources
from benchmarks._on_flux_protocol import Protocol, Training

_PROMPTS = 8
_STOP_PROMPTS = 6  # the fewest that a stop rule takes


def dry_run(out: Path) -> tuple[Protocol, Sources]:
    """Write tiny checkpoints to ``out``, once, and say what is drawn and where they are."""
    unseen = playground.prompts(_PROMPTS + _STOP_PROMPTS, seed=1, held_out=True)
    training = Training(
        prompts=tuple(playground.prompts(_PROMPTS, seed=0)),
        held_out=tuple(unseen[_PROMPTS:]),
        rounds=2,
        aesthetic_gain=-100.0,  # tiny scorers know nothing, so nothing is dropped, and no round is refused
        clip_drop=100.0,
        stop_gain=-1e6,
        trainer=DifferentialLoRATrainer(rank=4, steps=8, batch_size=4, learning_rate=1e-3),
        sample=2,
        sample_steps=2,
    )
    protocol = Protocol(
        prompt_set="the playground's captions",
        prompts=tuple(unseen[:_PROMPTS]),
        size_px=64,
        steps=6,
        batch_size=8,
        training=training,
        tokens=24,
        is_dry_run=True,
        guide=aa.OutputMix(),
    )
    return protocol, tiny_sources(out / "tiny")


def tiny_sources(folder: Path) -> Sources:
    """Tiny checkpoints of everything in a folder, and a LoRA that nobody trained."""
    clip, lora = folder / "clip", folder / "lora.safetensors"
    if not lora.exists():  # the last to be written
        tiny.write_clip(clip)
        tiny.write_dino(folder / "dino")
        tiny.write_critic(folder / "critic")
        tiny.write_llava(folder / "judge")
        tiny.write_aesthetic(folder / "aesthetic.safetensors")
        tiny.write_hps(folder / "hps.safetensors")
        tiny.write_image_reward(folder / "image_reward.safetensors")
        down, up = torch.ones(1, 16), 0.1 * torch.linspace(-1, 1, 128)[:, None]
        aa.LoRA({"x_embedder": aa.LowRank(down, up)}).save(lora)
    return Sources(
        base=str(playground.WEIGHTS),
        loras={"from a file": str(lora)},
        judge=str(folder / "judge"),
        critic=str(folder / "critic"),
        aesthetic=str(folder / "aesthetic.safetensors"),
        hps=str(folder / "hps.safetensors"),
        image_reward=str(folder / "image_reward.safetensors"),
        clip=str(clip),
        clip_h=str(clip),
        pickscore=str(clip),
        similarity=str(folder / "dino"),
        bert=str(clip),
        coordinates=Coordinates("thousandths"),
        constrained=False,
        device="cpu",
    )
