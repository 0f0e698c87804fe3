"""What several families do alike: sizes, latents of a VAE, words that are cut, the shift of noise levels."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d

from artaug._internal.images import as_rgb
from artaug.errors import GuideError, InvalidValueError, ModelError
from artaug.regional.denoiser import AttentionLayer, EncodedPrompt, Span
from artaug.training.noise_schedule import FlowMatching

Pipeline: TypeAlias = Any
"""A diffusers pipeline, whose parts differ from class to class."""

Tokenizer: TypeAlias = Any
"""A tokenizer of transformers."""


def check_parts(pipeline: Pipeline, names: Sequence[str]) -> None:
    """Refuse a pipeline that lacks a part.

    Raises:
        ModelError: naming what is missing.
    """
    missing = [name for name in names if getattr(pipeline, name, None) is None]
    if missing:
        raise ModelError(
            f"this {type(pipeline).__name__} was loaded without {missing}. Drawing and training need all parts."
        )


def check_size(pipeline: Pipeline, *, width: int, height: int, multiple: int) -> None:
    """Refuse a size in pixels that is not whole image tokens.

    Raises:
        ModelError: naming the size and what it has to be a multiple of.
    """
    if min(width, height) < 1 or width % multiple or height % multiple:
        raise ModelError(
            f"a picture of {width} x {height} pixels is not whole image tokens: "
            f"this {type(pipeline).__name__} needs positive multiples of {multiple}."
        )


def check_true_cfg(negative_prompt: str | None, true_cfg_scale: float) -> None:
    """Refuse a negative prompt without a scale above 1, or such a scale without a negative prompt.

    Raises:
        ModelError: since either alone would have no effect.
    """
    if (negative_prompt is None) != (true_cfg_scale == 1) or true_cfg_scale < 1:
        raise ModelError(
            f"negative_prompt={negative_prompt!r} with true_cfg_scale={true_cfg_scale} would have no "
            "effect: set both (a scale above 1), or neither."
        )


def check_no_true_cfg(pipeline: Pipeline, true_cfg_scale: float) -> None:
    """Refuse ``true_cfg_scale`` for a model whose ``guidance_scale`` is classifier-free guidance already.

    Raises:
        ModelError: since it would be ignored.
    """
    if true_cfg_scale != 1:
        raise ModelError(
            f"true_cfg_scale={true_cfg_scale} would be ignored: the guidance_scale of a {type(pipeline).__name__} is "
            "classifier-free guidance itself. Set guidance_scale."
        )


@torch.no_grad()
def vae_latents(pipeline: Pipeline, images: Sequence[Image], *, width: int, height: int) -> Tensor:
    """Latents of pictures, shifted and scaled as the VAE's config says: float32, (batch, channels, rows, columns).

    Raises:
        ModelError: if a picture has another size.
    """
    for image in images:
        if image.size != (width, height):
            raise ModelError(
                f"a picture of {image.width} x {image.height} pixels cannot be encoded at {width} x "
                f"{height}. Resize it, or set the synthesizer's width and height."
            )
    pixels = pipeline.image_processor.preprocess([as_rgb(image) for image in images], height=height, width=width)
    vae = pipeline.vae
    device = pipeline._execution_device  # noqa: SLF001 - .device is wrong under offload
    latents: Tensor = vae.encode(pixels.to(device, vae.dtype)).latent_dist.mode().float()
    scaled: Tensor = (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
    return scaled


def latent_masks(pipeline: Pipeline, masks: Tensor, *, width: int, height: int) -> Tensor:
    """Masks (batch, height, width) as masks of latents: float32, (batch, channels, rows, columns), channels all alike.

    A latent gets the mean of the square of pixels it stands for; what a VAE sees beyond that square is not counted.

    Raises:
        ModelError: if the masks have another size.
        InvalidValueError: if a value is outside [0, 1].
    """
    if masks.shape[1:] != (height, width):
        raise ModelError(
            f"masks of shape {tuple(masks.shape)} cannot be encoded at {width} x {height}. Expected (batch, height, "
            f"width): ({len(masks)}, {height}, {width})."
        )
    if not ((masks >= 0) & (masks <= 1)).all():
        raise InvalidValueError(
            f"masks run from {masks.min().item():g} to {masks.max().item():g}. Expected how much of every pixel is "
            "meant, in [0, 1]."
        )
    config = pipeline.vae.config
    channels = config.get("latent_channels") or config.z_dim  # as Qwen-Image's VAE calls them
    return avg_pool2d(masks.float().unsqueeze(1), pipeline.vae_scale_factor).expand(-1, channels, -1, -1)


def shifted_flow(config: Mapping[str, Any], *, tokens: int) -> FlowMatching:
    """Velocity at sigmas shifted as a flow matching Euler scheduler shifts them for a picture of so many tokens.

    A scheduler that stretches its sigmas to end early (``shift_terminal``) does so in training too: a model is asked for
    nothing below. Rearranging the steps of a run (``use_karras_sigmas`` and the like) is the sampler's own business.
    """
    terminal = float(config.get("shift_terminal") or 0.0)
    if not config.get("use_dynamic_shifting"):
        return FlowMatching(shift=float(config.get("shift", 1.0)), shift_terminal=terminal)
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = low + (high - low) * (tokens - few) / (many - few)
    shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    return FlowMatching(shift=shift, shift_terminal=terminal)


def joined_texts(
    base: Tensor, prompts: Sequence[Sequence[EncodedPrompt]], *, name: str, trim_padding: bool, ahead: bool
) -> tuple[Tensor, list[tuple[Span, ...]]]:
    """Put region prompts beside the prompt each row of a batch has, rows filled up to one length with zeros.

    Args:
        base: the prompts of a call, (rows, tokens, channels).
        prompts: for every row those to add.
        name: of the tokens in a text's conditioning.
        trim_padding: leave a text's padding out.
        ahead: put them ahead of the row's own prompt, not behind. What the image sees most of, itself and the row's own
            prompt, should be neighbours: then attention takes both without copying them together.

    Returns:
        The longer prompts, and what each row holds.
    """
    added = [
        [text.conditioning[name][0][text.token_slice if trim_padding else slice(None)].to(base) for text in of_row]
        for of_row in prompts
    ]
    longest = max(sum(map(len, parts)) for parts in added)
    rows, spans = [], []
    for own, parts in zip(base, added, strict=True):
        missing = longest - sum(map(len, parts))
        more = [*parts, own.new_zeros(missing, own.shape[-1])]
        told = [Span("text", len(part), number) for number, part in enumerate(parts, start=1)]
        told += [Span("padding", missing)] if missing else []
        rows.append(torch.cat([*more, own] if ahead else [own, *more]))
        spans.append((*told, Span("text", len(own))) if ahead else (Span("text", len(own)), *told))
    return torch.stack(rows), spans


def check_processor(attention: AttentionLayer, expected: type) -> None:
    """Refuse an attention layer whose processor is not the one a regional twin was written for.

    Raises:
        GuideError: if it is of another class (an IP-Adapter's, another guide's), set to an attention backend of its own,
            or split over devices: its work would be lost without a word.
    """
    processor = attention.processor
    if type(processor) is not expected:
        raise GuideError(
            f"this model's attention uses {type(processor).__name__}, and regional attention would replace it. "
            f"Expected {expected.__name__}, as a fresh pipeline has: unload IP-Adapters and other guides first."
        )
    if (backend := getattr(processor, "_attention_backend", None)) is not None:
        raise GuideError(
            f"this model was set to the attention backend {str(backend)!r}, which would drop or misread regions. "
            "Call its reset_attention_backend() first: regional attention chooses fast kernels by itself."
        )
    if getattr(processor, "_parallel_config", None) is not None:
        raise GuideError("this model's attention is split over devices (context parallelism), which regions cannot be.")
