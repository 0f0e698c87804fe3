"""What every family's tests ask of it: its calls as the pipeline makes them, and its attention as it happens."""

from contextlib import contextmanager

import torch
from PIL import Image
from torch.nn.functional import scaled_dot_product_attention

from artaug.diffusion import DiffusersSynthesizer
from artaug.regional.denoiser import bind_forward_args
from artaug.regional.regional_attention import RegionalAttention

WIDTH, HEIGHT = 24, 32
LIMIT = 48


def family_of(kind, pipeline, **options):
    defaults = {"width": WIDTH, "height": HEIGHT, "guidance_scale": None, "negative_prompt": None}
    return kind(**{"pipeline": pipeline, **defaults, "true_cfg_scale": 1.0, "max_sequence_length": LIMIT, **options})


def synthesizer_of(family, *, guide=None, steps=2):
    """A synthesizer that draws as a family is set."""
    return DiffusersSynthesizer(
        pipeline=family.pipeline,
        family=type(family),
        guide=guide,
        width=family.width,
        height=family.height,
        steps=steps,
        guidance_scale=family.guidance_scale,
        negative_prompt=family.negative_prompt,
        true_cfg_scale=family.true_cfg_scale,
        max_sequence_length=family.max_sequence_length,
    )


def picture(seed=0, *, width=WIDTH, height=HEIGHT):
    noise = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def drawn_directly(family, prompts, *, seeds, steps=2, **options):
    """What the pipeline draws by itself, without artaug."""
    return family.pipeline(
        prompt=list(prompts),
        width=family.width,
        height=family.height,
        num_inference_steps=steps,
        max_sequence_length=family.max_sequence_length,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **options,
    ).images


@contextmanager
def recorded(module):
    """Every call of a denoiser, its arguments by name, and what came of it."""
    calls = []
    watch = module.register_forward_hook(
        lambda _module, args, call, output: calls.append((bind_forward_args(module, args, call), output)),
        with_kwargs=True,
    )
    with watch:
        yield calls


def calls_directly(family, prompts, **options):
    with recorded(family.module) as calls:
        drawn_directly(family, prompts, seeds=range(len(prompts)), output_type="latent", **options)
    return calls


def run_of(family, prompts, *, steps=2):
    """The calls of a synthesizer's run, and the denoiser a guide would see in it."""
    conditioning = family.encode_prompts(prompts)
    negative = None if family.negative is None else family.encode_prompts([family.negative] * len(prompts))
    with recorded(family.module) as calls:
        family.pipeline(
            **family.pipeline_kwargs(conditioning, negative),
            width=family.width,
            height=family.height,
            num_inference_steps=steps,
            generator=[torch.Generator().manual_seed(seed) for seed in range(len(prompts))],
            output_type="latent",
        )
    return family.denoiser(conditioning), calls


@contextmanager
def twins(denoiser, attend_at=lambda _site: scaled_dot_product_attention):
    """Every attention layer with its twin for a time; yields the sites at work with their queries and keys, in order."""
    seen = []

    def watching(site):
        attend = attend_at(site)

        def attended(query, key, value):
            seen.append((site, query, key))
            return attend(query, key, value)

        return attended

    kept = [(site.attention, site.attention.processor) for site in denoiser.sites]
    for site in denoiser.sites:
        site.attention.processor = denoiser.processor(site, watching(site))
    patched = getattr(denoiser, "patched", None)
    try:
        if patched is None:
            yield seen
        else:
            with patched():
                yield seen
    finally:
        for attention, processor in kept:
            attention.processor = processor


@torch.no_grad()
def asked(denoiser, call):
    return denoiser.prediction(denoiser.module(**call))


def spread(spans, kind=None):
    """Each span with the slice of the sequence it is: of a kind, or all."""
    found, start = [], 0
    for span in spans:
        if kind in {None, span.kind}:
            found.append((span, slice(start, start + span.length)))
        start += span.length
    return found


def in_stead(spans):
    """For each site attention in which the first region's prompt is seen in place of the plan's own."""
    apart = {("text", 0): 1, ("padding", 0): 2}

    def attend_at(site):
        kinds = {"text", "padding"} if site.kind == "text" else {"image", "reference", "text", "padding"}
        worlds = [
            [
                apart.get((span.kind, span.prompt), 0)
                for span in of_row
                if span.kind in kinds
                for _ in range(span.length)
            ]
            for of_row in spans
        ]
        worlds = torch.tensor(worlds)
        together = (worlds[:, :, None] == worlds[:, None, :])[:, None]
        return lambda query, key, value: scaled_dot_product_attention(query, key, value, attn_mask=together)

    return attend_at


def streams(denoiser, call, spans):
    """Of every linear layer that tokens go through in a call: what `stream` says, and how many tokens there were."""
    kinds = {
        "image": {"image", "reference"},
        "text": {"text", "padding"},
        "joint": {"image", "reference", "text", "padding"},
    }
    counts = {stream: sum(span.length for span in spans[0] if span.kind in held) for stream, held in kinds.items()}
    seen, hooks = {}, []

    def watching(name):
        def watch(_layer, inputs):
            seen.setdefault(name, inputs[0].shape)

        return watch

    for name, layer in denoiser.module.named_modules():
        if isinstance(layer, torch.nn.Linear):
            hooks.append(layer.register_forward_pre_hook(watching(name)))
    with twins(denoiser):
        asked(denoiser, call)
    for hook in hooks:
        hook.remove()
    return {
        name: (denoiser.token_stream(name), [stream for stream, count in counts.items() if shape[1:-1] == (count,)])
        for name, shape in seen.items()
    }


def guided(family, plans, *, steps=2, **options):
    """What `RegionalAttention` draws of plans, with seeds of their own."""
    synthesizer = synthesizer_of(family, guide=RegionalAttention(**options), steps=steps)
    return synthesizer.synthesize_batch(plans, seeds=range(len(plans)))
