"""What a training will take in memory and time, found out before any weights are read."""

import math
import os
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from artaug.diffusion.estimation.dry_run import Cost, DryRun
from artaug.diffusion.estimation.meta_pipeline import meta_pipeline, modules, stored_bytes, text_shapes
from artaug.diffusion.estimation.report import Estimate
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.registry import family_of
from artaug.diffusion.offload import has_quantized_weights
from artaug.errors import InvalidValueError
from artaug.training.config import TrainingConfig
from artaug.training.optimizers import AdamW8bit, Optimizer
from artaug.training.trainer import DifferentialLoRATrainer

_FLOAT32 = 4
_PROBED = 65536
_QUANTISED_MOMENTS = 2 * (1 + 4 / 256)
"""Bytes a number: two of one byte each, and a float32 scale for every 256 of them."""


def estimate(  # noqa: PLR0913 - keyword-only options, all but the first with defaults
    source: str | os.PathLike[str] | DiffusionPipeline,
    *,
    family: type[Family] | None = None,
    trainer: TrainingConfig | None = None,
    width: int = 1024,
    height: int = 1024,
    max_sequence_length: int | None = None,
    dtype: torch.dtype | None = None,
    storage_dtype: torch.dtype | None = None,
    bits_per_weight: float | None = None,
    flops_per_second: float | None = None,
    fused_norms: bool = True,
) -> Estimate:
    """Say what training a model will take, before anything is loaded.

    The trainer's own step is run: the model is built from its configs on torch's meta device, where a tensor has a shape
    and a type and no numbers, the LoRA is put on as in a training, and the objective's loss is computed and
    differentiated. Whatever is made on the way is counted until nothing holds it. So targets, rank, objective, gradient
    checkpointing and batch size count as they will.

    Args:
        source: a folder or a name on the Hub, of which only configs are read, or a loaded pipeline, whose weights count
            as they are stored.
        family: of the pipeline, one of your own for a pipeline artaug does not know; None to recognise it.
        trainer: how it is to be trained; the default trainer without one.
        width: of the pictures, in pixels.
        height: of the pictures, in pixels.
        max_sequence_length: tokens of a prompt, None for what is usual. Models that read prompts as long as they are
            (Qwen-Image, Z-Image) need less for shorter ones.
        dtype: of the weights and of what is computed with them; None for bfloat16, or a loaded pipeline's own.
        storage_dtype: of the denoiser's weights between calls, if ``enable_layerwise_casting`` of diffusers is to store
            them so (``torch.float8_e4m3fn``): all but norms and what modulates them. Unpacked ones count as long as
            autograd keeps them: those of a block with gradient checkpointing, all of them without.
        bits_per_weight: of the denoiser's linear layers, where bitsandbytes is to store them in fewer: 8 in int8, 4.5 in
            nf4 (a float32 scale for every 64 weights). It is taken as said; every layer is unpacked to ``dtype`` when it
            is used, and one at a time.
        flops_per_second: what the device really does, for the time. A third to a half of what its maker states is usual.
        fused_norms: whether the device computes a root mean square norm in one kernel, as GPUs do and CPUs do not.

    Raises:
        ModelError: if there is no pipeline, if artaug cannot say what its denoiser is given, or for a size it does not
            take.
        LoRAMismatchError: if the trainer's ``targets`` select no layer.
        InvalidValueError: for bits, a speed or a type that are none, and for a source that is no pipeline.
        MissingExtraError: if the trainer's optimizer is of a package that is not installed.

    >>> import artaug as aa
    >>> from artaug import playground
    >>> from artaug.diffusion import estimate
    >>> told = estimate(playground.synthesizer().pipeline, width=64, height=64)
    >>> told.fits(2**30)
    True
    """
    config = DifferentialLoRATrainer() if trainer is None else trainer
    _check(storage_dtype, bits_per_weight, flops_per_second)
    _check_source(source, dtype, storage_dtype)
    if dtype is None:
        dtype = source.dtype if isinstance(source, DiffusionPipeline) else torch.bfloat16
    pipeline = meta_pipeline(source, dtype=dtype, family=family)
    bound = _bound(pipeline, family, width=width, height=height, max_sequence_length=max_sequence_length)
    denoiser: Any = bound.module
    if storage_dtype is not None:
        denoiser.enable_layerwise_casting(storage_dtype=storage_dtype, compute_dtype=dtype)
    run = DryRun(family=bound, config=config, text=text_shapes(bound), dtype=dtype, fused_norms=fused_norms)
    encoding = run.encoding()
    held = source if isinstance(source, DiffusionPipeline) else pipeline
    sizes = {name: stored_bytes(part) for name, part in modules(held)}
    (at,) = (name for name, part in modules(pipeline) if part is denoiser)
    packed = bits_per_weight is not None or has_quantized_weights(getattr(held, at))
    stored = sizes[at] if storage_dtype is None else stored_bytes(denoiser)
    sizes[at], unpacked = _packed(denoiser, stored, bits_per_weight)
    encoders = sum(size for name, size in sizes.items() if name.startswith(("text_encoder", "vae")))
    activations, flops, trained = _stages(run)
    optimizer = math.ceil(trained * _state_of(config.optimizer))
    exported = _FLOAT32 * trained
    average = exported if config.ema is not None else 0
    return Estimate(
        model=type(pipeline).__name__,
        width=width,
        height=height,
        micro_batch_size=run.pairs,
        trainable_parameters=trained,
        weights_bytes=sum(sizes.values()) - encoders,
        encoders_bytes=encoders,
        encoding_bytes=encoding.peak_bytes,
        adapter_bytes=2 * exported + optimizer + average,
        activations_bytes=activations + unpacked,
        lora_bytes=_FLOAT32 * run.exported(),
        checkpoint_bytes=exported + optimizer + average,
        steps=config.steps,
        flops_per_step=flops,
        flops_per_second=flops_per_second,
        offloaded_bytes=0 if packed else sizes[at],
    )


def _check(storage: torch.dtype | None, bits_per_weight: float | None, flops_per_second: float | None) -> None:
    if storage is not None and (bits_per_weight is not None or not storage.is_floating_point):
        raise InvalidValueError(
            f"storage_dtype={storage} with bits_per_weight={bits_per_weight}: expected a floating type like "
            "torch.float8_e4m3fn, or bits, not both."
        )
    if bits_per_weight is not None and not 0 < bits_per_weight <= 32:
        raise InvalidValueError(f"bits_per_weight={bits_per_weight}: need more than 0 and at most 32.")
    if flops_per_second is not None and not 0 < flops_per_second < math.inf:
        raise InvalidValueError(f"flops_per_second={flops_per_second}: need a finite speed above 0.")


def _check_source(source: object, dtype: object, storage: torch.dtype | None) -> None:
    if not isinstance(source, str | os.PathLike | DiffusionPipeline):
        raise InvalidValueError(
            f"received a {type(source).__name__} to estimate. Expected a diffusers pipeline (a synthesizer's is its "
            ".pipeline), a folder, or a name on the Hub."
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InvalidValueError(f"dtype={dtype!r}: need a floating type like torch.bfloat16.")
    if storage is not None and isinstance(source, DiffusionPipeline):
        hooks = (
            getattr(getattr(one, "_diffusers_hook", None), "hooks", {})
            for _, part in modules(source)
            for one in part.modules()
        )
        if any("layerwise_casting" in one for one in hooks):
            raise InvalidValueError(
                f"storage_dtype={storage}, and parts of this pipeline are stored by enable_layerwise_casting already. Leave it "
                "out: a loaded pipeline counts as it is stored."
            )


def _bound(
    pipeline: DiffusionPipeline,
    family: type[Family] | None,
    *,
    width: int,
    height: int,
    max_sequence_length: int | None,
) -> Family:
    kind = family or family_of(pipeline)
    return kind(
        pipeline=pipeline,
        width=width,
        height=height,
        guidance_scale=None,
        negative_prompt=None,
        true_cfg_scale=1.0,
        max_sequence_length=kind.default_max_sequence_length if max_sequence_length is None else max_sequence_length,
    )


def _stages(run: DryRun) -> tuple[int, int, int]:
    """The most any stage holds, what a step computes on average, and how many numbers are trained."""
    stages = run.config.objective.training_plan(1).stages
    works: list[Cost] = []
    trained = 0
    flops, whole = 0.0, math.fsum(stage.share for stage in stages)
    echo = min(run.config.echo, run.config.steps)
    for number, stage in enumerate(stages):
        work, trained = run.step(stage, under=number)
        again = work if echo == 1 else run.step(stage, under=number, remembered=True)[0]
        works.append(work)
        flops += (work.flops + (echo - 1) * again.flops) / echo * stage.share / whole
    return max(work.peak_bytes for work in works), round(flops * run.config.batch_size / run.pairs), trained


def _packed(module: nn.Module, stored: int, bits: float | None) -> tuple[int, int]:
    """What the denoiser takes as it is stored, and its largest layer unpacked, if layers are packed."""
    whole = stored_bytes(module)
    linear = [one.weight for one in module.modules() if isinstance(one, nn.Linear)]
    if bits is not None:
        plain = sum(one.numel() * one.element_size() for one in linear)
        stored = whole - plain + sum(math.ceil(one.numel() * bits / 8) for one in linear)
    return stored, max(one.numel() * one.element_size() for one in linear) if stored < whole else 0


def _state_of(optimizer: Optimizer) -> float:
    """Bytes an optimizer keeps for every number it trains at most, found out by letting it take one step."""
    if isinstance(optimizer, AdamW8bit):
        return _QUANTISED_MOMENTS  # whose kernels may want a GPU
    probe = nn.Parameter(torch.ones(_PROBED))  # some keep less of zeros
    probe.grad = torch.ones(_PROBED)
    made = optimizer.build([probe], learning_rate=1e-4)
    if hasattr(made, "train"):
        made.train()  # schedule-free ones ask for it
    made.step()
    held = [one for one in made.state[probe].values() if isinstance(one, torch.Tensor) and one.ndim]
    return sum(one.numel() * one.element_size() for one in held) / _PROBED
