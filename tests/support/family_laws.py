"""What the tests of every family need: its calls as the pipeline makes them, and its attention as it happens."""

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


def drawn_by_pipeline(family, prompts, *, seeds, steps=2, **options):
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
def record_calls(module):
    """Record every call of a denoiser in a ``with`` block: its arguments by name, and its output."""
    calls = []
    watch = module.register_forward_hook(
        lambda _module, args, call, output: calls.append((bind_forward_args(module, args, call), output)),
        with_kwargs=True,
    )
    with watch:
        yield calls


def pipeline_calls(family, prompts, **options):
    with record_calls(family.module) as calls:
        drawn_by_pipeline(family, prompts, seeds=range(len(prompts)), output_type="latent", **options)
    return calls


def recorded_run(family, prompts, *, steps=2):
    """The calls of a synthesizer's run, and the denoiser a guide would see in it."""
    conditioning = family.encode_prompts(prompts)
    negative = None if family.negative is None else family.encode_prompts([family.negative] * len(prompts))
    with record_calls(family.module) as calls:
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
def with_processors(denoiser, attention_at=lambda _site: scaled_dot_product_attention):
    """Give every site its regional processor in a ``with`` block; yields (site, query, key) of each attention, in order."""
    attentions = []

    def recording(site):
        attention_fn = attention_at(site)

        def recorded_attention(query, key, value, attn_mask=None):
            attentions.append((site, query, key))
            return attention_fn(query, key, value) if attn_mask is None else attention_fn(query, key, value, attn_mask)

        return recorded_attention

    original = [(site.attention, site.attention.processor) for site in denoiser.sites]
    for site in denoiser.sites:
        site.attention.processor = denoiser.processor(site, recording(site))
    try:
        with denoiser.patched():
            yield attentions
    finally:
        for attention, processor in original:
            attention.processor = processor


@torch.no_grad()
def predict_call(denoiser, call):
    return denoiser.prediction(denoiser.module(**call))


def span_slices(spans, kind=None):
    """Each span, of a kind or all, with its slice of the sequence."""
    slices, start = [], 0
    for span in spans:
        if kind in {None, span.kind}:
            slices.append((span, slice(start, start + span.length)))
        start += span.length
    return slices


def region_replaces_plan(spans):
    """For each site an attention in which the first region's prompt takes the place of the plan's own.

    Tokens attend within their world: the plan's own prompt and its padding are worlds of their own.
    """
    own_worlds = {("text", 0): 1, ("padding", 0): 2}

    def attention_at(site):
        kinds = {"text", "padding"} if site.kind == "text" else {"image", "reference", "text", "padding"}
        worlds = torch.tensor(
            [
                [
                    own_worlds.get((span.kind, span.prompt), 0)
                    for span in row_spans
                    if span.kind in kinds
                    for _ in range(span.length)
                ]
                for row_spans in spans
            ]
        )
        mask = (worlds[:, :, None] == worlds[:, None, :])[:, None]
        return lambda query, key, value: scaled_dot_product_attention(query, key, value, attn_mask=mask)

    return attention_at


def token_streams_of(denoiser, call, spans):
    """For every linear layer what `token_stream` says, and the streams that have as many tokens as it got in a call."""
    kinds = {
        "image": {"image", "reference"},
        "text": {"text", "padding"},
        "joint": {"image", "reference", "text", "padding"},
    }
    counts = {
        stream: sum(span.length for span in spans[0] if span.kind in members) for stream, members in kinds.items()
    }
    shapes, hooks = {}, []

    def recording(name):
        def record(_layer, inputs):
            shapes.setdefault(name, inputs[0].shape)

        return record

    for name, layer in denoiser.module.named_modules():
        if isinstance(layer, torch.nn.Linear):
            hooks.append(layer.register_forward_pre_hook(recording(name)))
    with with_processors(denoiser):
        predict_call(denoiser, call)
    for hook in hooks:
        hook.remove()
    return {
        name: (denoiser.token_stream(name), [stream for stream, count in counts.items() if shape[1:-1] == (count,)])
        for name, shape in shapes.items()
    }


def guided(family, plans, *, steps=2, **options):
    """What `RegionalAttention` draws of plans, with seeds of their own."""
    synthesizer = synthesizer_of(family, guide=RegionalAttention(**options), steps=steps)
    return synthesizer.synthesize_batch(plans, seeds=range(len(plans)))
