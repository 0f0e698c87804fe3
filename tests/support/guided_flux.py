"""A tiny FLUX under a guide: whole drawings, and single steps with the outputs of every block."""

import numpy as np
import torch

import artaug as aa
from artaug.diffusion import DiffusersSynthesizer, Flux
from artaug.regional import EncodedRegion
from support.guiding import under
from support.tiny_flux import TINY_SIZE

LEFT, RIGHT, FULL = aa.Box(0, 0, 0.5, 1), aa.Box(0.5, 0, 1, 1), aa.Box(0, 0, 1, 1)
PROMPT = "a red barn"
ISOLATED = aa.Isolation(image_to_image="regions")


def synthesizer(pipeline, guide=None, **options):
    size = {"width": TINY_SIZE, "height": TINY_SIZE, "steps": 2, "max_sequence_length": 24}
    return DiffusersSynthesizer(pipeline=pipeline, guide=guide, **{**size, **options})


def draw(pipeline, plan, guide, *, seed=0, **options):
    return np.asarray(synthesizer(pipeline, guide, **options).synthesize(plan, seed=seed)).astype(int)


class GuidedStep:
    """One step of a guided run: its prediction, and the output of every block."""

    def __init__(self, pipeline, regions, *, prompts=(PROMPT,), guide=None, sigma=0.7):
        self.flux = Flux(
            pipeline=pipeline,
            width=TINY_SIZE,
            height=TINY_SIZE,
            guidance_scale=None,
            negative_prompt=None,
            true_cfg_scale=1.0,
            max_sequence_length=24,
        )
        self.conditioning = self.flux.encode_prompts(list(prompts))
        self.latents = torch.randn(len(prompts), 64, 16, generator=torch.Generator().manual_seed(0))
        self.sigma = sigma
        self.block_outputs = []
        hooks = [
            block.register_forward_hook(lambda _block, _args, output: self.block_outputs.append(output))
            for block in (*pipeline.transformer.transformer_blocks, *pipeline.transformer.single_transformer_blocks)
        ]
        guide = guide or aa.RegionalAttention()
        with under(guide, self.flux.denoiser(self.conditioning), [self.encode(row) for row in regions]):
            self.prediction = self.predict()
        for hook in hooks:
            hook.remove()

    def encode(self, regions):
        return [EncodedRegion(region, *self.flux.encode_separately([region.prompt])) for region in regions]

    def predict(self):
        return self.flux.predict(self.latents, torch.full((len(self.latents),), self.sigma), self.conditioning)
