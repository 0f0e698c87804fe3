"""A guide on a denoiser as a test has it: the run that a synthesizer would make."""

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
