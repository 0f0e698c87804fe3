"""`estimate`: memory and time of a training, computed on the meta device before any weights are read."""

import math
import os
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from artaug._internal.annotations import checked
from artaug.diffusion.estimation.dry_run import DryRun
from artaug.diffusion.estimation.meta_pipeline import meta_pipeline, modules, stored_bytes, text_shapes
from artaug.diffusion.estimation.report import Estimate
from artaug.diffusion.families.base import Family
from artaug.diffusion.families.registry import family_of
from artaug.diffusion.offload import has_quantized_weights
from artaug.errors import InvalidValueError
from artaug.training.config import TrainingConfig
from artaug.training.optimizers import AdamW8bit, Optimizer
from artaug.training.trainer import DifferentialLoRATrainer

_FLOAT32_BYTES = 4
_PROBE_SIZE = 65536
_ADAMW_8BIT_BYTES = 2 * (1 + 4 / 256)
"""Bytes a parameter: two moments of one byte each, and a float32 scale for every 256 of them."""


@checked
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
    """Estimate memory and time of a training before any weights are loaded.

    The trainer's own step is run on torch's meta device, where a tensor has a shape and a type and no data: the model is
    built from its configs, the adapter is injected as in a training, the objective's loss is computed and
    differentiated, and live memory is tracked. So targets, rank, objective, gradient checkpointing and batch size count
    as in the real training.

    Args:
        source: a folder or a name on the Hub, of which only configs are read, or a loaded pipeline, whose weights count
            as they are stored.
        family: of the pipeline: your own for a pipeline that artaug does not know; None to recognise it.
        trainer: the training to estimate; the default trainer if None.
        width: of the pictures, in pixels.
        height: of the pictures, in pixels.
        max_sequence_length: tokens of a prompt, None for the family's default. Models without padding (Qwen-Image,
            Z-Image) need less for shorter prompts.
        dtype: of the weights and of the computation; None for bfloat16, or a loaded pipeline's own.
        storage_dtype: of the denoiser's weights between calls, if ``enable_layerwise_casting`` of diffusers will store
            them so (``torch.float8_e4m3fn``): all but norms and their modulation. Unpacked weights count as long as
            autograd saves them: those of one block with gradient checkpointing, all of them without.
        bits_per_weight: of the denoiser's linear layers, if bitsandbytes will store them in fewer: 8 in int8, 4.5 in nf4
            (4 bits and a float32 scale for every 64 weights). One layer at a time is unpacked to ``dtype``.
        flops_per_second: the real throughput of the device, for the time; usually a third to a half of the data sheet's.
        fused_norms: whether the device computes an RMS norm in one kernel, as GPUs do and CPUs do not.

    Raises:
        ModelError: if there is no pipeline, if artaug does not know the inputs of its denoiser, or for a size that it
            does not support.
        LoRAMismatchError: if the trainer's ``targets`` select no layer.
        InvalidValueError: for an illegal number of bits, throughput or type, and for a source that is not a pipeline.
        MissingExtraError: if the trainer's optimizer is of a package that is not installed.

    >>> import artaug as aa
    >>> from artaug import playground
    >>> from artaug.diffusion import estimate
    >>> estimate(playground.synthesizer().pipeline, width=64, height=64).fits(2**30)
    True
    """
    config = DifferentialLoRATrainer() if trainer is None else trainer
    _check_numbers(storage_dtype, bits_per_weight, flops_per_second)
    _check_source(source, dtype, storage_dtype)
    if dtype is None:
        dtype = source.dtype if isinstance(source, DiffusionPipeline) else torch.bfloat16
    pipeline = meta_pipeline(source, dtype=dtype, family=family)
    bound = _bound(pipeline, family, width=width, height=height, max_sequence_length=max_sequence_length)
    denoiser: Any = bound.module
    if storage_dtype is not None:
        denoiser.enable_layerwise_casting(storage_dtype=storage_dtype, compute_dtype=dtype)
    run = DryRun(family=bound, config=config, text=text_shapes(bound), dtype=dtype, fused_norms=fused_norms)
    encoding = run.encoding_cost()
    stored = source if isinstance(source, DiffusionPipeline) else pipeline
    sizes = {name: stored_bytes(part) for name, part in modules(stored)}
    (denoiser_name,) = (name for name, part in modules(pipeline) if part is denoiser)
    pinned = bits_per_weight is not None or has_quantized_weights(getattr(stored, denoiser_name))
    denoiser_bytes = sizes[denoiser_name] if storage_dtype is None else stored_bytes(denoiser)
    sizes[denoiser_name], unpacked = _quantized_bytes(denoiser, denoiser_bytes, bits_per_weight)
    idle = ("text_encoder",) if config.objective.decodes else ("text_encoder", "vae")
    encoders = sum(size for name, size in sizes.items() if name.startswith(idle))
    activations, flops, trainable, of_companion = _training_cost(run)
    learning = trainable + of_companion
    optimizer = math.ceil(learning * _optimizer_bytes_per_parameter(config.optimizer))
    parameters = _FLOAT32_BYTES * learning
    average = _FLOAT32_BYTES * trainable if config.ema is not None else 0
    return Estimate(
        model=type(pipeline).__name__,
        width=width,
        height=height,
        micro_batch_size=run.micro_batch_size,
        trainable_parameters=learning,
        weights_bytes=sum(sizes.values()) - encoders,
        encoders_bytes=encoders,
        encoding_bytes=encoding.peak_bytes,
        adapter_bytes=2 * parameters + optimizer + average,
        activations_bytes=activations + unpacked,
        lora_bytes=_FLOAT32_BYTES * run.lora_parameters(),
        checkpoint_bytes=parameters + optimizer + average,
        steps=config.steps,
        flops_per_step=flops,
        flops_per_second=flops_per_second,
        offloaded_bytes=0 if pinned else sizes[denoiser_name],
    )


def _check_numbers(
    storage_dtype: torch.dtype | None, bits_per_weight: float | None, flops_per_second: float | None
) -> None:
    if storage_dtype is not None and (bits_per_weight is not None or not storage_dtype.is_floating_point):
        raise InvalidValueError(
            f"storage_dtype={storage_dtype} with bits_per_weight={bits_per_weight}: expected a floating type like "
            "torch.float8_e4m3fn, or bits, not both."
        )
    if bits_per_weight is not None and not 0 < bits_per_weight <= 32:
        raise InvalidValueError(f"bits_per_weight={bits_per_weight}: need more than 0 and at most 32.")
    if flops_per_second is not None and not 0 < flops_per_second < math.inf:
        raise InvalidValueError(f"flops_per_second={flops_per_second}: need a finite speed above 0.")


def _check_source(source: object, dtype: object, storage_dtype: torch.dtype | None) -> None:
    if not isinstance(source, str | os.PathLike | DiffusionPipeline):
        raise InvalidValueError(
            f"received a {type(source).__name__} to estimate. Expected a diffusers pipeline (a synthesizer's is its "
            ".pipeline), a folder, or a name on the Hub."
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InvalidValueError(f"dtype={dtype!r}: need a floating type like torch.bfloat16.")
    if storage_dtype is not None and isinstance(source, DiffusionPipeline):
        hooks = (
            getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
            for _, part in modules(source)
            for module in part.modules()
        )
        if any("layerwise_casting" in names for names in hooks):
            raise InvalidValueError(
                f"storage_dtype={storage_dtype}, and parts of this pipeline are stored by enable_layerwise_casting already. Leave it "
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
    family = family or family_of(pipeline)
    return family(
        pipeline=pipeline,
        width=width,
        height=height,
        guidance_scale=None,
        negative_prompt=None,
        true_cfg_scale=1.0,
        max_sequence_length=family.default_max_sequence_length if max_sequence_length is None else max_sequence_length,
    )


def _training_cost(run: DryRun) -> tuple[int, int, int, int]:
    """Peak bytes of all stages, mean FLOPs of an optimizer step, and the parameters of the student and of the largest companion."""
    stages = run.config.objective.training_plan(1).stages
    total_share = math.fsum(stage.share for stage in stages)
    echo = min(run.config.echo or run.config.objective.recommended_echo, run.config.steps)
    peak_bytes, trainable, of_companion, flops = 0, 0, 0, 0.0
    for index, stage in enumerate(stages):
        step = run.step_cost(stage, active_loras=index)
        cost, trainable, of_companion = step.cost, step.trainable, max(of_companion, step.of_companion)
        # Of the steps on one batch, all but the first find the teacher's predictions in its cache; beside a companion there is none.
        is_cached = echo > 1 and stage.companion is None
        cached = run.step_cost(stage, active_loras=index, cached_teacher=True).cost if is_cached else cost
        peak_bytes = max(peak_bytes, cost.peak_bytes)
        flops += (cost.flops + (echo - 1) * cached.flops) / echo * stage.share / total_share
    flops_per_step = round(flops * run.config.batch_size / run.micro_batch_size)
    return peak_bytes, flops_per_step, trainable, of_companion


def _quantized_bytes(module: nn.Module, stored: int, bits_per_weight: float | None) -> tuple[int, int]:
    """Bytes of a module with its linear layers quantized, and of its largest layer unpacked (0 if none is quantized)."""
    unquantized = stored_bytes(module)
    linear = [layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)]
    sizes = [weight.numel() * weight.element_size() for weight in linear]
    if bits_per_weight is not None:
        quantized = sum(math.ceil(weight.numel() * bits_per_weight / 8) for weight in linear)
        stored = unquantized - sum(sizes) + quantized
    return stored, max(sizes) if stored < unquantized else 0


def _optimizer_bytes_per_parameter(optimizer: Optimizer) -> float:
    """Bytes of an optimizer's state for each parameter, measured after one step on a probe."""
    if isinstance(optimizer, AdamW8bit):
        return _ADAMW_8BIT_BYTES  # its kernels may need a GPU
    probe = nn.Parameter(torch.ones(_PROBE_SIZE))  # not zeros, of which some optimizers keep less
    probe.grad = torch.ones(_PROBE_SIZE)
    torch_optimizer = optimizer.build([probe], learning_rate=1e-4)
    if hasattr(torch_optimizer, "train"):
        torch_optimizer.train()  # schedule-free optimizers require it
    torch_optimizer.step()
    state = [value for value in torch_optimizer.state[probe].values() if isinstance(value, torch.Tensor) and value.ndim]
    return sum(value.numel() * value.element_size() for value in state) / _PROBE_SIZE
