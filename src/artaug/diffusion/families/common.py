"""What several families share: checks of a pipeline, latents of a VAE, guidance branches, joined prompts, processors."""

import math
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self, TypeAlias

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from einops import rearrange
from PIL.Image import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from artaug._internal.images import as_rgb
from artaug._internal.truncation import warn_if_truncated
from artaug.errors import GuideError, InvalidValueError, ModelError
from artaug.regional.denoiser import (
    AttentionFn,
    AttentionLayer,
    AttentionProcessor,
    AttentionSite,
    Branches,
    Conditioning,
    Denoiser,
    EncodedPrompt,
    ForwardKwargs,
    Span,
)
from artaug.training.noise_schedule import FlowMatching

Pipeline: TypeAlias = Any
"""A diffusers pipeline; its parts differ from class to class."""

Tokenizer: TypeAlias = Any
"""A tokenizer of transformers."""


def check_components(pipeline: Pipeline, names: Sequence[str]) -> None:
    """Refuse a pipeline that lacks a component.

    Raises:
        ModelError: naming what is missing.
    """
    missing = [name for name in names if getattr(pipeline, name, None) is None]
    if missing:
        raise ModelError(
            f"this {type(pipeline).__name__} was loaded without {missing}. Drawing and training need all parts."
        )


def check_reads_latents_alone(pipeline: Pipeline, denoiser: Any, *, packing: int = 1) -> None:  # noqa: ANN401 - of diffusers
    """Refuse a denoiser that reads more than latents, such as one that was made to inpaint.

    Args:
        pipeline: that it belongs to.
        denoiser: with its config.
        packing: how many latent pixels the channels of one token hold.

    Raises:
        ModelError: naming the channels.
    """
    latent, read = _latent_channels(pipeline) * packing, denoiser.config.in_channels
    if latent != read:
        raise ModelError(
            f"this {type(denoiser).__name__} reads {read} channels, and latents have {latent}: it was made to read a picture or a "
            "mask beside them (FLUX.1 Fill, Control, inpainting models). Load the model that draws; it inpaints with a Canvas too."
        )


def check_no_ip_adapter(transformer: Any) -> None:  # noqa: ANN401 - FLUX.1's and SD3's
    """Refuse a transformer with an IP-Adapter, which cannot be called without pictures.

    Raises:
        ModelError: naming the processor.
    """
    names = {type(processor).__name__ for processor in transformer.attn_processors.values()}
    if adapters := sorted(name for name in names if "IPAdapter" in name):
        raise ModelError(
            f"this {type(transformer).__name__} has an IP-Adapter ({adapters[0]}), whose pictures are read on Stable Diffusion and "
            "SDXL only. Call pipeline.unload_ip_adapter() first."
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


def check_negative_has_effect(
    pipeline: Pipeline, negative_prompt: str | None, *, is_guided: bool, scale: float
) -> None:
    """Refuse a negative prompt in a run without classifier-free guidance.

    Raises:
        ModelError: since the negative prompt would have no effect.
    """
    if negative_prompt is not None and not is_guided:
        raise ModelError(
            f"negative_prompt={negative_prompt!r} would be ignored: this {type(pipeline).__name__} draws without "
            f"classifier-free guidance at guidance_scale={scale}. Set a guidance_scale above 1 for a model that takes "
            "it, or leave the negative prompt out."
        )


def separate_branches(rows: int, *, is_cond: bool) -> Branches:
    """The rows of one call where classifier-free guidance calls the denoiser once for each branch.

    >>> from artaug.diffusion.families.common import separate_branches
    >>> separate_branches(2, is_cond=False)
    Branches(cond=range(0, 0), uncond=range(0, 2))
    """
    return Branches(cond=range(rows)) if is_cond else Branches(cond=range(0), uncond=range(rows))


def batched_branches(rows: int, *, pictures: int) -> Branches:
    """Split the rows of one call with classifier-free guidance: the negative prompts' rows come first.

    Args:
        rows: of the call's batch.
        pictures: that the run draws.

    Raises:
        GuideError: if there are neither one nor two rows for each picture.

    >>> from artaug.diffusion.families.common import batched_branches
    >>> batched_branches(4, pictures=2)
    Branches(cond=range(2, 4), uncond=range(0, 2))
    """
    if rows == pictures:
        return Branches(cond=range(rows))
    if rows == 2 * pictures:
        return Branches(cond=range(pictures, rows), uncond=range(pictures))
    raise GuideError(
        f"the denoiser was called with {rows} rows in a run of {pictures} pictures. Expected {pictures}, or "
        f"{2 * pictures} with classifier-free guidance: more branches (as of perturbed attention) cannot be guided."
    )


def latent_pictures(denoiser: Denoiser, model_input: Tensor, kwargs: ForwardKwargs) -> Tensor:
    """The latents of one branch in the input of a model that takes pictures of latents: the first of its channels."""
    branches, module = denoiser.branches(kwargs), denoiser.module
    rows = branches.cond or branches.uncond
    return model_input[rows.start : rows.stop, : module.config.out_channels]  # type: ignore[union-attr]


def prompt_tokens(
    prompts: Sequence[str], tokenizer: Tokenizer, *, reader: str | None, limit: int, remedy: str = ""
) -> Hashable:
    """The tokens of prompts, for `kept_encoding`, with a warning of every part that an encoder cuts.

    Args:
        prompts: the prompts of one call.
        tokenizer: a tokenizer of transformers.
        reader: name of the encoder, for the message; None for one that cuts what another cuts, so that one message does.
        limit: number of tokens that the encoder reads, with the special ones.
        remedy: what to do about it, as a sentence.
    """
    tokens = tokenizer(list(prompts), verbose=False).input_ids
    for prompt, prompt_ids in zip(prompts, tokens, strict=True):
        if reader is not None and len(prompt_ids) > limit:
            warn_if_truncated(prompt, reader=reader, tokenizer=tokenizer, limit=limit, remedy=remedy, stacklevel=4)
    return limit, tokenizer_settings(tokenizer), tuple(map(tuple, tokens))


def tokenizer_settings(tokenizer: Tokenizer) -> Hashable:
    """How a tokenizer pads and cuts, and the tokens that it was given later, such as the words of a textual inversion."""
    sides = (getattr(tokenizer, name, None) for name in ("padding_side", "truncation_side", "pad_token_id"))
    return *sides, tuple(getattr(tokenizer, "added_tokens_encoder", {}).items())


def prompt_kwargs(conditioning: Conditioning, negative: Conditioning | None) -> dict[str, Any]:
    """Encoded prompts as a pipeline's call takes them: those of the negative prompts begin with ``negative_``."""
    return {**conditioning, **{f"negative_{name}": tensor for name, tensor in (negative or {}).items()}}


def image_pixels(pipeline: Pipeline, images: Sequence[Image], *, width: int, height: int) -> Tensor:
    """Pictures as the VAE takes them, in its type and on its device: (batch, 3, height, width), in [-1, 1].

    Raises:
        ModelError: if a picture has another size.
    """
    for image in images:
        if image.size != (width, height):
            raise ModelError(
                f"a picture of {image.width} x {image.height} pixels cannot be encoded at {width} x "
                f"{height}. Resize it, or set the synthesizer's width and height."
            )
    warn_if_tiled(pipeline, width=width, height=height)
    pixels = pipeline.image_processor.preprocess([as_rgb(image) for image in images], height=height, width=width)
    device = pipeline._execution_device  # noqa: SLF001 - .device is wrong under offload
    return pixels.to(device, pipeline.vae.dtype)  # type: ignore[no-any-return]


def warn_if_tiled(pipeline: Pipeline, *, width: int, height: int) -> None:
    """Warn if the VAE decodes and encodes pictures of this size in tiles, whose seams are learned with everything else."""
    vae = getattr(pipeline, "vae", None)
    if not getattr(vae, "use_tiling", False):
        return
    side = getattr(vae, "tile_sample_min_size", 0)
    tile_width, tile_height = getattr(vae, "tile_sample_min_width", side), getattr(vae, "tile_sample_min_height", side)
    if width > tile_width or height > tile_height:
        warnings.warn(
            f"the VAE works in tiles of {tile_width} x {tile_height} pixels on pictures of {width} x {height}, which leaves "
            "seams: a critic sees them, and a LoRA that learns from the pictures draws a grid. Call "
            "pipeline.vae.disable_tiling(); pipeline.vae.enable_slicing() and smaller batches save memory without seams.",
            stacklevel=3,
        )


@torch.no_grad()
def vae_latents(pipeline: Pipeline, images: Sequence[Image], *, width: int, height: int) -> Tensor:
    """Latents of pictures, shifted and scaled as the VAE's config says: float32, (batch, channels, rows, columns).

    Raises:
        ModelError: if a picture has another size.
    """
    vae = pipeline.vae
    pixels = image_pixels(pipeline, images, width=width, height=height)
    latents: Tensor = vae.encode(pixels).latent_dist.mode().float()
    scaled: Tensor = (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor
    return scaled


def vae_pictures(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """Pictures of latents (batch, channels, rows, columns) that are shifted and scaled as the VAE's config says: the inverse of `vae_latents`."""
    config = pipeline.vae.config
    return decode(pipeline, latents / config.scaling_factor + (config.get("shift_factor") or 0.0))


def decode(pipeline: Pipeline, latents: Tensor) -> Tensor:
    """What the VAE makes of its own latents, as the pipeline shows it: float32, (batch, 3, ..., height, width), in [0, 1].

    Gradients flow to the latents, and to no weight.
    """
    vae = pipeline.vae
    device = pipeline._execution_device  # noqa: SLF001 - .device is wrong under offload
    with frozen(vae):
        pixels = vae.decode(latents.to(device, vae.dtype), return_dict=False)[0]
    pictures: Tensor = (pixels.float() / 2 + 0.5).clamp(0, 1)
    return pictures


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let no gradient flow to the weights of a module in a ``with`` block."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad = True


def latent_masks(pipeline: Pipeline, masks: Tensor, *, width: int, height: int) -> Tensor:
    """Masks of pixels (batch, height, width) as masks of latents: float32, (batch, channels, rows, columns).

    A latent pixel gets the mean over the square of pixels it stands for; all channels are equal. The VAE's receptive
    field is larger than that square, which is not counted.

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
    return avg_pool2d(masks.float().unsqueeze(1), pipeline.vae_scale_factor).expand(
        -1, _latent_channels(pipeline), -1, -1
    )


def prepared_noise(pipeline: Pipeline, seeds: Sequence[int], *, width: int, height: int, dtype: torch.dtype) -> Tensor:
    """What ``pipeline.prepare_latents`` returns for pictures of these seeds: float32, one row for each.

    Args:
        pipeline: of diffusers, by whose order the arguments are passed.
        seeds: each picture has its own generator, as `DiffusersSynthesizer` gives it.
        width: in pixels.
        height: in pixels.
        dtype: in which the pipeline draws noise; in another one the numbers are others.
    """
    prepared = pipeline.prepare_latents(
        len(seeds),
        _latent_channels(pipeline),
        height,
        width,
        dtype,
        pipeline._execution_device,  # noqa: SLF001 - .device is wrong under offload
        [torch.Generator().manual_seed(seed) for seed in seeds],
    )
    latents: Tensor = prepared[0] if isinstance(prepared, tuple) else prepared  # those of FLUX come with positions
    return latents.float()


def _latent_channels(pipeline: Pipeline) -> int:
    config = pipeline.vae.config
    return int(config.get("latent_channels") or config.z_dim)  # the name in the config of Qwen-Image's VAE


def pack_latents(latents: Tensor) -> Tensor:
    """Pack latents as FLUX does: each 2 x 2 patch of latent pixels becomes one image token.

    Args:
        latents: (batch, channels, rows, columns), rows and columns even.

    Returns:
        (batch, rows / 2 * columns / 2, channels * 4). A token holds its patch channel by channel.
    """
    packed: Tensor = rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)
    return packed


def unpack_latents(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack_latents`, of ``rows`` times ``columns`` image tokens."""
    latents: Tensor = rearrange(tokens, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=rows, w=columns, ph=2, pw=2)
    return latents


def shifted_flow(config: Mapping[str, Any], *, tokens: int) -> FlowMatching:
    """Velocity at sigmas shifted as a flow matching Euler scheduler shifts them for a picture of so many tokens.

    A scheduler that stretches its sigmas to end early (``shift_terminal``) ends early in training, too: the model is
    never called at lower noise. How a run spaces its steps (``use_karras_sigmas`` and the like) does not matter here.
    """
    terminal = float(config.get("shift_terminal") or 0.0)
    if not config.get("use_dynamic_shifting"):
        return FlowMatching(shift=float(config.get("shift", 1.0)), shift_terminal=terminal)
    # mu is linear in the number of image tokens, and the shift is exp(mu): see calculate_shift of diffusers.
    base_tokens, max_tokens = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base_shift, max_shift = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = base_shift + (max_shift - base_shift) * (tokens - base_tokens) / (max_tokens - base_tokens)
    shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    return FlowMatching(shift=shift, shift_terminal=terminal)


def join_prompts(
    base: Tensor, prompts: Sequence[Sequence[EncodedPrompt]], *, name: str, trim_padding: bool, prepend: bool
) -> tuple[Tensor, list[tuple[Span, ...]]]:
    """Join region prompts to the prompt of each row, with zeros behind them where a row is shorter.

    Args:
        base: the prompts of a call, (rows, tokens, channels).
        prompts: for every row its region prompts.
        name: of the tokens in a prompt's conditioning.
        trim_padding: leave a region prompt's padding out.
        prepend: put them before the row's own prompt, not behind it. The image and the row's own prompt, which most
            queries see, are then neighbours in the sequence, and attention reads both without a copy.

    Returns:
        The joined prompts (rows, more tokens, channels), and the spans of each row.
    """
    row_parts = [
        [prompt.conditioning[name][0][prompt.token_slice if trim_padding else slice(None)].to(base) for prompt in row]
        for row in prompts
    ]
    longest = max(sum(map(len, parts)) for parts in row_parts)
    rows, spans = [], []
    for own, parts in zip(base, row_parts, strict=True):
        padding = longest - sum(map(len, parts))
        tokens = [*parts, own.new_zeros(padding, own.shape[-1])]
        row_spans = [Span("text", len(part), number) for number, part in enumerate(parts, start=1)]
        row_spans += [Span("padding", padding)] if padding else []
        own_span = Span("text", len(own))
        rows.append(torch.cat([*tokens, own] if prepend else [own, *tokens]))
        spans.append((*row_spans, own_span) if prepend else (own_span, *row_spans))
    return torch.stack(rows), spans


def mmdit_stream(layer: str) -> Literal["image", "text", "joint"] | None:
    """`AttentiveDenoiser.token_stream` for MMDiTs as diffusers names their layers: FLUX, Chroma, SD3."""
    if "norm" in layer or "modulation" in layer or layer.startswith("time_"):
        return None
    if layer.startswith("single_transformer_blocks"):
        return "joint"
    text_layers = ("context_embedder", ".ff_context.", ".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out")
    return "text" if any(part in layer for part in text_layers) else "image"


def double_and_single_sites(transformer: Any) -> list[AttentionSite]:  # noqa: ANN401 - FLUX, FLUX.2 and Chroma
    """The attention of double-stream blocks, then of single-stream blocks, each a stack of its own."""
    double, single = transformer.transformer_blocks, transformer.single_transformer_blocks
    return [
        *(AttentionSite(layer.attn, block) for block, layer in enumerate(double)),
        *(
            AttentionSite(layer.attn, block, stack_start=len(double))
            for block, layer in enumerate(single, start=len(double))
        ),
    ]


_UNDOING = {
    "IPAdapter": "call pipeline.unload_ip_adapter()",
    "Sliced": "call pipeline.disable_attention_slicing()",
    "XFormers": "call pipeline.disable_xformers_memory_efficient_attention()",
    "Fused": "call pipeline.unfuse_qkv_projections()",
}
"""What takes a processor of diffusers off a model again, by a part of its class name; the first that fits counts."""


def _how_to_undo(processor_name: str) -> str:
    """What to call so that the model has its own processors again."""
    fitting = (undoing for part, undoing in _UNDOING.items() if part in processor_name)
    return f"{next(fitting, 'take off what set it, such as an adapter or another guide,')} first"


_BACKENDS_REFUSED = (
    ("sage", "rounds the scores to few bits, so its parts do not merge into exact attention"),
    ("varlen", "reads a mask of queries and keys as one of keys"),
    ("flex", "returns no log-sum-exp through diffusers, and builds its tiles anew in every layer"),
    ("xformers", "returns no log-sum-exp, by which parts of attention are merged"),
    ("_native_math", "returns no log-sum-exp, by which parts of attention are merged"),
    ("_native_", "is a single kernel, of which regions take several"),
    ("", "takes no mask, and has not been compared with exact attention under regions"),
)
"""Why a backend of diffusers cannot compute regional attention, by a part of its name; the first that fits counts."""


def check_backend(processor: AttentionProcessor) -> None:
    """Refuse a processor that computes with another attention backend than torch's own choice of kernels.

    ``"native"`` is that choice, and exact: it calls the function that regional attention calls. A processor without a backend
    of its own has the one that is active in diffusers, which `set_attention_backend` of any model sets, and
    ``reset_attention_backend`` does not reset.

    Raises:
        GuideError: naming the backend, and why it cannot have regions.
    """
    if not hasattr(processor, "_attention_backend"):  # calls torch itself, whatever the backend: SD3, UNets
        return
    active, _ = _AttentionBackendRegistry.get_active_backend()
    backend = AttentionBackendName(processor._attention_backend or active).value  # noqa: SLF001 - what dispatch reads
    if backend != AttentionBackendName.NATIVE.value:
        reason = next(reason for part, reason in _BACKENDS_REFUSED if part in backend)
        raise GuideError(
            f"this model computes attention with the backend {backend!r}, which {reason}. "
            "Call its set_attention_backend('native') first: torch then takes the fastest of its kernels."
        )


class RegionalProcessor:
    """A twin of one of diffusers' attention processors that computes attention with `attention_fn`.

    A twin keeps upstream's names and order, so that a diff against the installed file shows only the lines that differ.
    """

    upstream: ClassVar[type]
    """The processor it is a twin of."""

    def __init__(self, attention_fn: AttentionFn) -> None:
        """Compute attention with ``attention_fn``."""
        self._attention_fn = attention_fn

    @classmethod
    def for_layer(cls, attention: AttentionLayer, attention_fn: AttentionFn) -> Self:
        """Build the twin of a layer's processor.

        Raises:
            GuideError: if the layer's processor is of another class (an IP-Adapter's, another guide's), computes with an
                attention backend that regions cannot have (see `check_backend`), or is split over devices: what it does would
                be lost.
        """
        processor = attention.processor
        if type(processor) is not cls.upstream:
            raise GuideError(
                f"this model's attention uses {type(processor).__name__}, and regional attention would replace it. "
                f"Expected {cls.upstream.__name__}, as a fresh pipeline has: {_how_to_undo(type(processor).__name__)}."
            )
        check_backend(processor)
        if getattr(processor, "_parallel_config", None) is not None:
            raise GuideError(
                "this model's attention is split over devices (context parallelism), which regions cannot be."
            )
        return cls(attention_fn)
