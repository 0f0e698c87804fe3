"""Guides as tests have them: on a denoiser alone, by the run that a synthesizer would make, and one that moves nothing."""

import torch

import artaug as aa
from artaug.regional import GuidedRun
from artaug.regional.guide import steer


def no_phrases(_prompt, phrases):
    return [()] * len(phrases)


def run_of(denoiser, regions, *, prompts=(), phrase_tokens=no_phrases):
    prompts = prompts or [f"picture {number}" for number in range(len(regions))]
    plans = [
        aa.Plan(prompt, tuple(encoded.region for encoded in row)) for prompt, row in zip(prompts, regions, strict=True)
    ]
    return GuidedRun(denoiser=denoiser, plans=plans, regions=regions, phrase_tokens=phrase_tokens)


def under(guide, denoiser, regions, **options):
    return steer(guide, run_of(denoiser, regions, **options))


class Stays(aa.LatentGuide):
    """Asks for a prediction and its gradient before every step, and moves nothing."""

    def moved(self, latents, step, predict):
        wanted = latents.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(predict(wanted).square().sum(), wanted)
        assert gradient.abs().max() > 0
        return latents
