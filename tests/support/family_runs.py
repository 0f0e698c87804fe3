"""What tests of families share: a pipeline's calls of its denoiser, regional processors, pictures with and without artaug."""

import functools
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from PIL import Image

from artaug.diffusion import DiffusersSynthesizer
from artaug.regional.denoiser import bind_forward_args


def picture(seed=0, *, width, height):
    noise = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


def drawn_by_pipeline(pipeline, prompts, **options):
    """What the pipeline draws of itself, the i-th picture from seed i."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return pixels(pipeline(prompts, generator=generators, num_inference_steps=2, **options).images)


def drawn_by_artaug(family_class, pipeline, plans, **options):
    synthesizer = DiffusersSynthesizer(pipeline=pipeline, family=family_class, steps=2, **options)
    return pixels(synthesizer.synthesize_batch(plans, seeds=list(range(len(plans)))))


def calls_of(family, prompts, *, steps=3, **options):
    """The calls a pipeline makes of its denoiser in a run of its own, by name, and what each predicted."""
    calls = []
    watch = family.module.register_forward_hook(
        lambda module, args, call, output: calls.append((bind_forward_args(module, args, call), output[0])),
        with_kwargs=True,
    )
    with watch:
        family.pipeline(
            prompts,
            width=family.width,
            height=family.height,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **options,
        )
    return calls


@contextmanager
def attending(denoiser, attend_at):
    """Every site's twin in place, attending as ``attend_at(site)`` says."""
    with ExitStack() as undo:
        for site in denoiser.sites:
            undo.callback(site.attention.set_processor, site.attention.processor)
            site.attention.set_processor(denoiser.processor(site, attend_at(site)))
        yield


def tokens_into_layers(denoiser, call):
    """The shape of what goes into each linear layer and convolution, by its name."""
    shapes = {}
    with ExitStack() as undo:
        for name, layer in denoiser.module.named_modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                note = functools.partial(_note, shapes, name)
                undo.callback(layer.register_forward_pre_hook(note).remove)
        predicted(denoiser, call)
    return shapes


def _note(shapes, name, _layer, args):
    shapes[name] = tuple(args[0].shape)


@torch.no_grad()
def predicted(denoiser, call):
    return denoiser.prediction(denoiser.module(**call))
