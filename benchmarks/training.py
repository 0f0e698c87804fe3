"""The cost of a training step: artaug's objectives, and the logic of diffusers' own FLUX LoRA script, on one model."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from statistics import median, quantiles

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.training_utils import (
    cast_training_params,
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
)
from matplotlib.figure import Figure
from peft import LoraConfig
from torch import Tensor, nn

import artaug as aa
from artaug.training import ATTENTION_AND_MLP, FlowMatching, PairBatch
from artaug.training.batches import StepBatch
from artaug.training.distributed import SINGLE_PROCESS
from artaug.training.injection import find_target_layers, inject_adapter, restored_on_exit
from artaug.training.optimizer_loop import OptimizerLoop
from artaug.training.teacher_cache import TeacherCache
from benchmarks import _flux as flux
from benchmarks import _memory as memory
from benchmarks import _record as record

RANK = 16
RATE = 1e-4
SCRIPT = "diffusers' script"
"""The logic of ``train_dreambooth_lora_flux.py`` with cached latents and prompts, run here; its defaults otherwise. In
bfloat16 under autocast, where ``accelerate`` puts the model of a script with ``--mixed_precision bf16``."""
PLAIN = "SupervisedFineTuning"
DEFAULT = "PairedPreference"
ONCE = "PairedDifference, echo=1"
OBJECTIVES: dict[str, tuple[aa.Objective, int]] = {
    PLAIN: (aa.SupervisedFineTuning(), 1),
    DEFAULT: (aa.PairedPreference(), aa.PairedPreference.recommended_echo),
    "PairedDifference": (aa.PairedDifference(), aa.PairedDifference.recommended_echo),
    "PairedDifference, echo=2": (aa.PairedDifference(), 2),
    ONCE: (aa.PairedDifference(), 1),
    "DirectPreference": (aa.DirectPreference(), 1),
}
"""Objectives and their echo: with an echo of 4, a step that computes the teacher's prediction and three that read the cache;
the default objective with that of the trainer."""

SETTING = ("dtype", "storage", "pixels", "batch", "recomputing")
"""What is the same for a group of methods."""
QUANTIZED = (PLAIN, DEFAULT)
"""The methods measured on quantized bases: the ratio of the others to these is that of a plain base."""
ON_GPU = (*QUANTIZED, ONCE, SCRIPT)
"""The methods measured on a GPU."""

Step = Callable[[], object]
Method = Callable[[], AbstractContextManager[Step]]


@dataclass(frozen=True, kw_only=True, eq=False)
class RandomFlux:
    """A FLUX transformer with random weights, as a training step uses a model: packed latents, no encoders."""

    geometry: flux.Geometry
    module: FluxTransformer2DModel
    side: int
    """Image tokens on a side."""

    noise_schedule = FlowMatching(shift=3.0)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.geometry.device)

    def predict(self, noisy: Tensor, sigmas: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
        """The transformer's velocity, at the guidance scale used for drawing."""
        embeds = conditioning["prompt_embeds"]
        places = torch.cartesian_prod(torch.arange(1), *(torch.arange(self.side),) * 2).to(embeds)
        velocity: Tensor = self.module(
            hidden_states=noisy.to(embeds),
            timestep=sigmas.to(embeds),
            guidance=torch.full((len(noisy),), 3.5, device=embeds.device),
            pooled_projections=conditioning["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=places,
            return_dict=False,
        )[0]
        return velocity.to(noisy)

    def batch(self, size: int) -> PairBatch:
        """Random pairs."""
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device)

        latents = (size, self.side**2, flux.LATENT_CHANNELS)
        geometry = self.geometry
        return PairBatch(
            before=randn(*latents),
            after=randn(*latents),
            conditioning={
                "prompt_embeds": randn(size, geometry.base_tokens, geometry.text_channels).to(geometry.dtype),
                "pooled_prompt_embeds": randn(size, geometry.pooled_channels).to(geometry.dtype),
            },
            noise=randn(*latents),
            sigmas=self.noise_schedule.sample_sigmas(size, generator).to(self.device),
        )


@contextmanager
def artaug_steps(model: RandomFlux, objective: aa.Objective, echo: int, batch: PairBatch) -> Iterator[Step]:
    """The steps of artaug's trainer on one batch: as many as its echo."""
    generator, teacher_cache = torch.Generator().manual_seed(0), TeacherCache() if echo > 1 else None
    with inject_adapter(
        model, rank=RANK, targets=ATTENTION_AND_MLP, generator=generator, teacher_cache=teacher_cache
    ) as student:
        optimizer = aa.AdamW().build(student.parameters(), learning_rate=RATE)
        optimizer_loop = OptimizerLoop(student, optimizer, ema=None)

        def steps() -> None:
            step_batch = StepBatch(model, [replace(batch, noise=torch.randn_like(batch.noise))])
            for number in range(echo):
                optimizer_loop.step(
                    step_batch,
                    objective.loss,
                    number=number + 1,
                    learning_rate=RATE,
                    max_grad_norm=1.0,
                    world=SINGLE_PROCESS,
                )

        yield steps


@contextmanager
def diffusers_step(model: RandomFlux, batch: PairBatch) -> Iterator[Step]:
    """One step of diffusers' FLUX LoRA script, on the pictures after."""
    module, latents = model.module, batch.after
    layers, mixed = find_target_layers(module, ATTENTION_AND_MLP), model.geometry.dtype == torch.bfloat16
    schedule = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with restored_on_exit(module, layers):
        module.add_adapter(
            LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=list(layers))
        )
        cast_training_params([module], dtype=torch.float32)
        factors = [parameter for parameter in module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(factors, lr=RATE, weight_decay=1e-4)
        module.train()

        def step() -> object:
            density = compute_density_for_timestep_sampling("none", len(latents), 0.0, 1.0, 1.29)
            sigmas = schedule.sigmas[(density * schedule.config.num_train_timesteps).long()].to(latents)
            rows = sigmas[:, None, None]
            noise = torch.randn_like(latents)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=mixed):
                predicted = model.predict((1 - rows) * latents + rows * noise, sigmas, batch.conditioning)
            weights = compute_loss_weighting_for_sd3("none", sigmas)[:, None, None]
            errors = weights.float() * (predicted.float() - (noise - latents).float()) ** 2
            loss = errors.flatten(1).mean(1).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(factors, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach().item()

        yield step
    module._hf_peft_config_loaded = False  # noqa: SLF001 - add_adapter set it, and has no counterpart


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the methods are compared on."""

    side: int
    """Image tokens on a side."""
    batch: int
    recomputing: bool


def measure(*, quick: bool) -> Iterator[record.Row]:
    """Time whole training steps, interleaved, and count the memory they hold.

    With CUDA the transformer is FLUX.1-dev's own geometry computing in bfloat16, recomputing activations, at 512 and 1,024
    pixels, stored in bfloat16, fp8 and nf4; else a scaled-down one in float32 and bfloat16, with and without recomputing.
    Weights, latents and prompts are random. A round takes every method once, each time beginning with another one;
    ``seconds_per_step`` is the median over rounds, ``ratio_to_sft`` the median (and quartiles) of the ratio to plain
    fine-tuning within a round. ``peak_bytes`` holds weights, factors, moments and the most a step holds besides.
    `TwoStage` takes steps of plain fine-tuning.
    """
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        geometry = replace(flux.FLUX_DEV, double_blocks=1, single_blocks=2) if quick else flux.FLUX_DEV
        geometries = [replace(geometry, storage=storage) for storage in ("plain", "fp8", "nf4")]
    else:
        geometries = [replace(flux.SCALED_DOWN, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    sizes, recomputing_settings = (1,) if quick else (1, 4), (True,) if on_gpu else (False,) if quick else (False, True)
    cases = [
        Case(side=side, batch=batch, recomputing=recomputing)
        for side, batch, recomputing in product((32, 64) if on_gpu else (16,), sizes, recomputing_settings)
    ]
    for geometry in geometries:
        yield from measure_geometry(geometry, cases, rounds=2 if on_gpu else 3 if quick else 5)
        gc.collect()


def measure_geometry(geometry: flux.Geometry, cases: Sequence[Case], *, rounds: int) -> Iterator[record.Row]:
    """The rows of one model, ``rounds`` times each method."""
    module = geometry.model()
    for case in cases:
        yield from measure_case(geometry, module, case, rounds=rounds)
        gc.collect()


def measure_case(
    geometry: flux.Geometry, module: FluxTransformer2DModel, case: Case, *, rounds: int
) -> list[record.Row]:
    """A row a method, for one case."""
    model = RandomFlux(geometry=geometry, module=module, side=case.side)
    batch = model.batch(case.batch)
    methods: dict[str, Method] = {
        name: partial(artaug_steps, model, *objective_and_echo, batch)
        for name, objective_and_echo in OBJECTIVES.items()
    }
    methods[SCRIPT] = partial(diffusers_step, model, batch)
    if geometry.storage != "plain" or geometry.device != "cpu":
        methods = {name: methods[name] for name in (ON_GPU if geometry.storage == "plain" else QUANTIZED)}
    peaks, seconds = {}, {name: list[float]() for name in methods}
    for name, method in methods.items():
        with gradient_checkpointing(model, method(), enable=case.recomputing) as step:
            step()  # makes the optimizer's moments
            peaks[name] = memory.peak_bytes(step, inputs=model.module.parameters())
    names = list(methods)
    for number in range(rounds):
        for name in (*names[number % len(names) :], *names[: number % len(names)]):
            with gradient_checkpointing(model, methods[name](), enable=case.recomputing) as step:
                seconds[name].append(seconds_of(step) / echo_of(name))
    return [row(model, case, name, seconds, peaks) for name in methods]


@contextmanager
def gradient_checkpointing(model: RandomFlux, method: AbstractContextManager[Step], *, enable: bool) -> Iterator[Step]:
    """A method with gradient checkpointing or without."""
    with method as step:
        if enable:
            model.module.enable_gradient_checkpointing()
        try:
            yield step
        finally:
            model.module.disable_gradient_checkpointing()


def echo_of(method: str) -> int:
    """How many optimizer steps are one call of its step."""
    return OBJECTIVES[method][1] if method in OBJECTIVES else 1


def seconds_of(step: Step) -> float:
    """Seconds a step takes."""
    memory.synchronize()
    start = time.perf_counter()
    step()
    memory.synchronize()
    return time.perf_counter() - start


def row(
    model: RandomFlux, case: Case, method: str, seconds: Mapping[str, Sequence[float]], peaks: Mapping[str, int]
) -> record.Row:
    """One method's numbers."""
    plain = seconds[PLAIN]
    ratios = [step / base for step, base in zip(seconds[method], plain, strict=True)]
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    return {
        "method": method,
        "echo": echo_of(method),
        "dtype": str(model.geometry.dtype).removeprefix("torch."),
        "storage": model.geometry.storage,
        "pixels": 16 * model.side,
        "batch": case.batch,
        "recomputing": case.recomputing,
        "seconds_per_step": median(seconds[method]),
        "pairs_per_second": case.batch / median(seconds[method]),
        "ratio_to_sft": median(ratios),
        "ratio_low": low,
        "ratio_high": high,
        "peak_bytes": peaks[method],
        **({"peak_to_script": peaks[method] / peaks[SCRIPT]} if SCRIPT in peaks else {}),
        "rank": RANK,
        "rounds": len(plain),
    }


def plot(rows: Sequence[record.Row]) -> Figure:
    """Time relative to plain fine-tuning and memory relative to the script: a group of bars for each setting."""
    measured = {row["method"] for row in rows}
    methods = [name for name in (*OBJECTIVES, SCRIPT) if name in measured]
    width = 0.85 / len(methods)
    figure = Figure(figsize=(14, 3.8))
    for place, (name, title) in enumerate(
        (("ratio_to_sft", "time of a step over plain fine-tuning"), ("peak_to_script", "memory over the script"))
    ):
        axes = figure.add_subplot(1, 2, place + 1, title=title)
        plotted_rows = [row for row in rows if name in row]
        settings = list(dict.fromkeys(tuple(row[key] for key in SETTING) for row in plotted_rows))
        for index, method in enumerate(methods):
            values = {tuple(row[key] for key in SETTING): row[name] for row in plotted_rows if row["method"] == method}
            axes.bar(
                [settings.index(setting) + (index - (len(methods) - 1) / 2) * width for setting in values],
                list(values.values()),
                0.9 * width,
                label=method,
            )
        labels = [
            f"{dtype if storage == 'plain' else storage}\n{pixels} px\nbatch {size}{chr(10) + 'recomputing' if recomputing else ''}"
            for dtype, storage, pixels, size, recomputing in settings
        ]
        axes.set_xticks(range(len(settings)), labels, fontsize=6)
        axes.axhline(1, color="grey", linewidth=0.5)
    figure.axes[1].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    record.run("training", measure, plot)
