"""The probe on the tiny model of every family: exact against dense probabilities of diffusers' own attention."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional

import artaug as aa
from artaug.diffusion.families.chroma.family import Chroma1
from artaug.diffusion.families.flux.family import Flux
from artaug.diffusion.families.qwen_image.family import QwenImage
from artaug.diffusion.families.sd3.family import StableDiffusion3
from artaug.diffusion.families.unet.family import StableDiffusion, StableDiffusionXL
from artaug.diffusion.families.z_image.attention import padded_length
from artaug.diffusion.families.z_image.family import ZImage
from artaug.regional import AttentiveDenoiser
from artaug.regional.guide import steer
from support.family_laws import family_of, span_slices, synthesizer_of
from support.family_pipelines import PIPELINES, tiny_family
from support.tiny_sd3 import tiny_sd3

PROMPTS = ["a red barn by the lake", "a lake, and in it a red boat at night"]
PHRASES = ["lake", "red barn"]  # the second is in the first prompt alone
LEFT = aa.Box(0, 0, 0.5, 1)
CLOSE = {"atol": 2e-6, "rtol": 2e-5}


@pytest.fixture(scope="module", params=PIPELINES, ids=lambda kind: kind.__name__)
def family(request):
    return tiny_family(request.param)


class Attentions:
    """Every scaled dot product attention of torch in a ``with`` block, dense: (queries, keys, probabilities)."""

    def __init__(self, monkeypatch):
        self.probs = []
        original = functional.scaled_dot_product_attention

        def recorded(query, key, value, attn_mask=None, **options):
            scores = query.double() @ key.double().mT / query.shape[-1] ** 0.5
            if attn_mask is not None:
                hidden = attn_mask.dtype == torch.bool
                scores = scores.masked_fill(~attn_mask, -torch.inf) if hidden else scores + attn_mask.double()
            self.probs.append(scores.softmax(dim=-1))
            return original(query, key, value, attn_mask=attn_mask, **options)

        monkeypatch.setattr(functional, "scaled_dot_product_attention", recorded)


def draw(family, guide, plans, *, steps=1):
    images = synthesizer_of(family, guide=guide, steps=steps).synthesize_batch(plans, seeds=range(len(plans)))
    return [image.tobytes() for image in images]


def dense_attentions(family, guide, plans):
    """What attention to text the transformer computes in the first call, layer by layer, as diffusers computes it."""
    with pytest.MonkeyPatch.context() as patch:
        attentions = Attentions(patch)
        inside = []
        module = family.module
        hooks = [
            module.register_forward_pre_hook(lambda *_: attentions.probs.clear()),
            module.register_forward_hook(lambda *_: inside.append(list(attentions.probs))),
        ]
        draw(family, guide, plans)
        for hook in hooks:
            hook.remove()
    return inside[0]


def read(family, guides=(), plans=None, **options):
    maps = []
    probe = aa.AttentionProbe(phrases=PHRASES, receive=maps.append, **options)
    draw(family, aa.Together((*guides, probe)), plans or [aa.Plan(prompt) for prompt in PROMPTS])
    return maps


def expected_maps(family, dense, site_grids, *, over="sequence"):
    """The maps of every layer, worked out from the whole matrices and each model's order of tokens."""
    pictures, kind = len(PROMPTS), type(family)
    guided_in_one_call = {StableDiffusion3, StableDiffusion, StableDiffusionXL}
    rows = slice(pictures, 2 * pictures) if kind in guided_in_one_call else slice(0, pictures)
    is_unet = kind in {StableDiffusion, StableDiffusionXL}
    text_length = family.encode_prompts(PROMPTS)["prompt_embeds"].shape[1]
    layers, probs = [], list(dense)
    for grid in site_grids:
        count = math.prod(grid)
        if is_unet:
            wanted = (count, text_length)
        elif kind is ZImage:
            wanted = (probs[-1].shape[2],) * 2
        else:
            wanted = (count + text_length,) * 2
        found = next(index for index, item in enumerate(probs) if item.shape[2:] == wanted)
        layer = probs[found][rows]
        probs = probs[found + 1 :]
        image, text = (slice(0, count), count) if kind is StableDiffusion3 else (slice(text_length, None), 0)
        image, text = (slice(0, count), padded_length(count)) if kind is ZImage else (image, text)
        image = slice(0, None) if is_unet else image
        maps = torch.zeros(pictures, len(PHRASES), layer.shape[1], count, dtype=torch.float64)
        for row, prompt in enumerate(PROMPTS):
            own = layer[row, :, image]
            if over == "prompt":
                length = padded_length(len(family._chat_tokens([prompt])[0])) if kind is ZImage else text_length  # noqa: SLF001
                own = own / own[:, :, text : text + length].sum(dim=-1, keepdim=True)
            for number, positions in enumerate(family.phrase_tokens(prompt, PHRASES)):
                for position in positions:
                    maps[row, number] += own[:, :, text + position]
        layers.append(maps)
    return layers


def grids_of(family):
    denoiser = family.denoiser(family.encode_prompts(PROMPTS))
    assert isinstance(denoiser, AttentiveDenoiser)
    return [site.grid or denoiser.token_grid for site in denoiser.sites if site.kind != "text"]


@pytest.mark.parametrize(("over", "heads"), [("sequence", False), ("sequence", True), ("prompt", False)])
def test_maps_are_the_dense_probabilities_of_the_models_own_attention(family, over, heads):
    plans = [aa.Plan(prompt) for prompt in PROMPTS]
    dense = dense_attentions(family, None, plans)
    maps = read(family, over=over, heads=heads)
    assert [call.call for call in maps] == [0]
    grids = grids_of(family)
    assert [layer.grid for layer in maps[0].layers] == grids
    expected = expected_maps(family, dense, grids, over=over)
    for layer, reference in zip(maps[0].layers, expected, strict=True):
        torch.testing.assert_close(layer.maps.double(), reference if heads else reference.mean(dim=2), **CLOSE)
    first = maps[0].layers[0].maps
    assert first[0].min() > 0
    assert (first[1, 1] == 0).all()  # its prompt does not hold the phrase


def test_the_second_attention_of_sd35_is_not_read():
    family = family_of(StableDiffusion3, tiny_sd3(is_35=True), width=32, height=32, max_sequence_length=128)
    dense = dense_attentions(family, None, [aa.Plan(prompt) for prompt in PROMPTS])
    layers = read(family)[0].layers
    grids = grids_of(family)
    assert len(layers) == len(family.pipeline.transformer.transformer_blocks)
    for layer, reference in zip(layers, expected_maps(family, dense, grids), strict=True):
        torch.testing.assert_close(layer.maps.double(), reference.mean(dim=2), **CLOSE)


def test_a_picture_with_a_probe_is_the_plain_picture_bit_for_bit(family):
    plans = [aa.Plan(prompt) for prompt in PROMPTS]
    probe = aa.AttentionProbe(phrases=PHRASES, receive=[].append)
    processors = [layer.processor for layer in family.module.modules() if hasattr(layer, "processor")]
    assert draw(family, probe, plans, steps=2) == draw(family, None, plans, steps=2)
    assert [layer.processor for layer in family.module.modules() if hasattr(layer, "processor")] == processors


class Spans(aa.Guide):
    """Notes the spans of the first call's rows, and which of them are the plans'."""

    reads_regions = False

    def __init__(self):
        self.noted = []

    @contextmanager
    def applied(self, run):
        def note(*_):
            if run.call is not None and run.call.branches.cond:
                self.noted.append(([row.spans for row in layers.current.value.rows], run.call.branches.cond))

        with run.attention() as layers, run.denoiser.module.register_forward_hook(note):
            yield


def image_and_prompt(spans, kind):
    """Where the image is among a row's queries, and its own prompt among its keys."""
    keys = [span for span in spans if kind == "joint" or span.kind in {"text", "padding"}]
    (prompt,) = (part for span, part in span_slices(keys, "text") if span.prompt == 0)
    image = slice(0, None) if kind == "cross" else span_slices(keys, "image")[0][1]
    return image, prompt, sum(span.length for span in keys)


@pytest.mark.parametrize("method", ["auto", "merged", "dense"])
def test_with_regional_attention_the_maps_are_those_of_its_dense_mask(family, method):
    regions = (aa.Region(LEFT, "ivy", weight=2.0), aa.Region(aa.Box(0.2, 0.1, 0.9, 0.7), "a blue door", feather=0.1))
    plans = [aa.Plan(PROMPTS[0], regions), aa.Plan(PROMPTS[1])]
    recording = Spans()
    dense = dense_attentions(family, aa.Together((aa.RegionalAttention(method="dense"), recording)), plans)
    layers = read(family, [aa.RegionalAttention(method=method)], plans)[0].layers
    spans, rows = recording.noted[0]
    kind = "cross" if isinstance(family, StableDiffusion | StableDiffusionXL) else "joint"
    keys = image_and_prompt(spans[rows[0]], kind)[2]
    probs_of_layers = [probs for probs in dense if probs.shape[3] == keys][-len(layers) :]
    for layer, probs in zip(layers, probs_of_layers, strict=True):
        for picture, row in enumerate(rows):
            image, prompt, _ = image_and_prompt(spans[row], kind)
            own = probs[row].mean(dim=0)[image]
            for phrase, positions in enumerate(family.phrase_tokens(PROMPTS[picture], PHRASES)):
                expected = own[:, [prompt.start + position for position in positions]].sum(dim=1)
                torch.testing.assert_close(layer.maps[picture, phrase].double(), expected, **CLOSE)


def trained_weights(family):
    site = family.denoiser(family.encode_prompts(PROMPTS)).sites[0]
    return [site.attention.to_q.weight] if hasattr(site.attention, "to_q") else [site.attention.to_qkv_mlp_proj.weight]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "kind", [Chroma1, Flux, StableDiffusion3, StableDiffusion, QwenImage, ZImage], ids=lambda k: k.__name__
)
def test_in_training_maps_have_the_gradient_of_the_dense_softmax(kind, checkpointing):
    family = tiny_family(kind)
    if kind in {Chroma1, StableDiffusion3, StableDiffusion, ZImage}:
        family = family_of(kind, family.pipeline, width=32, height=32, max_sequence_length=96, guidance_scale=0.0)
    plans = [aa.Plan(prompt) for prompt in PROMPTS]
    conditioning = family.encode_prompts(PROMPTS)
    noise = family.initial_noise([0, 1], conditioning)
    weights = trained_weights(family)

    def gradient_of(loss):
        return torch.autograd.grad(loss, weights)

    if checkpointing:
        family.module.enable_gradient_checkpointing()
    family.module.train(checkpointing)
    maps = []
    probe = aa.AttentionProbe(phrases=PHRASES, receive=maps.append)
    with steer(probe, family.guided_run(plans, conditioning)):
        family.predict(noise, torch.tensor([0.7, 0.7]), conditioning)
        gradients = gradient_of(sum(layer.maps.square().sum() for layer in maps[0].layers))
    family.module.eval()
    family.module.disable_gradient_checkpointing()
    assert len(maps) == 1

    losses = []
    run = family.guided_run(plans, conditioning)

    def observe_whole(site, attended):
        if site.kind == "text":
            return
        scores = attended.query @ attended.key.mT / attended.query.shape[-1] ** 0.5
        if attended.bias is not None:
            scores = scores + attended.bias.of(slice(0, None))
        probs = scores.softmax(dim=-1).mean(dim=1)
        for row, (prompt, spans) in enumerate(zip(PROMPTS, run.denoiser.spans(run.call.kwargs), strict=True)):
            image, text, _ = image_and_prompt(spans, site.kind)
            for positions in family.phrase_tokens(prompt, PHRASES):
                columns = [text.start + position for position in positions]
                losses.append(probs[row, image][:, columns].sum(dim=1).square().sum())

    with run.watched(), run.attention() as layers, layers.observed_by(observe_whole):
        family.predict(noise, torch.tensor([0.7, 0.7]), conditioning)
    expected = gradient_of(sum(losses))
    for gradient, reference in zip(gradients, expected, strict=True):
        assert reference.abs().max() > 0
        torch.testing.assert_close(gradient, reference, atol=1e-7, rtol=1e-3)
