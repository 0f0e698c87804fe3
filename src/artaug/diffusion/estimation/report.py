"""`Estimate`: memory, FLOPs and time of a training as a value, and its table."""

from dataclasses import dataclass

from artaug._internal.annotations import checked
from artaug._internal.text import duration, table_html


@checked
@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Memory and time of one process of a training; all sizes in bytes.

    Left out are: the driver's context (about half a gigabyte), fragmentation of the allocator, activations of the text
    encoders (less than the VAE's), temporaries of the optimizer (less than the activations, which are freed by then),
    and, for weights stored in fp8 with gradient checkpointing, up to one block's unpacked weights. A training begins and
    ends with the pipeline as it was given: one that is on the device completely takes `pipeline_bytes` there, even where
    that is more than `peak_bytes`; one with ``enable_model_cpu_offload`` does not.
    """

    model: str
    """Class of the pipeline."""
    width: int
    height: int
    micro_batch_size: int
    """Pairs in one forward and backward pass."""
    trainable_parameters: int
    """Of the adapter, and of a companion."""
    weights_bytes: int
    """Of the denoiser, and of other parts that stay on the device (a safety checker, for example)."""
    encoders_bytes: int
    """Of the text encoders and the VAE, which are on the CPU while the denoiser trains; the VAE of an objective that decodes counts in
    ``weights_bytes``."""
    encoding_bytes: int
    """Peak of encoding pictures, in addition to all weights."""
    adapter_bytes: int
    """The adapter's float32 parameters, their gradients, the optimizer's state, and the moving average if there is one."""
    activations_bytes: int
    """Peak of a forward and backward pass, in addition to weights and adapter."""
    lora_bytes: int
    """Size of the LoRA file, in float32."""
    checkpoint_bytes: int
    """Size of one checkpoint: parameters, the optimizer's state, the moving average."""
    steps: int
    flops_per_step: int
    """Multiplications and additions of matrix products, convolutions and attention, on average over all stages."""
    flops_per_second: float | None = None
    """Throughput of the device, as the caller gave it."""
    offloaded_bytes: int = 0
    """Of the denoiser, which is on the CPU while pairs are encoded; 0 where it is bound to its device (quantized)."""

    @property
    def training_bytes(self) -> int:
        """Peak memory while the denoiser trains."""
        return self.weights_bytes + self.adapter_bytes + self.activations_bytes

    @property
    def pipeline_bytes(self) -> int:
        """Memory of all parts of the pipeline, if all are on the device: before and after a training."""
        return self.weights_bytes + self.encoders_bytes

    @property
    def peak_bytes(self) -> int:
        """Peak memory of a training: while the denoiser trains, or while the pairs are encoded before."""
        return max(self.training_bytes, self.pipeline_bytes - self.offloaded_bytes + self.encoding_bytes)

    @property
    def seconds_per_step(self) -> float | None:
        """Time of a step, if the throughput is known."""
        return None if self.flops_per_second is None else self.flops_per_step / self.flops_per_second

    @property
    def seconds(self) -> float | None:
        """Time of all steps, if the throughput is known."""
        return None if self.seconds_per_step is None else self.steps * self.seconds_per_step

    def fits(self, memory_bytes: float) -> bool:
        """Whether a device with this much free memory is enough; see above for what is left out.

        >>> from artaug.diffusion import Estimate
        >>> sizes = {name: 1 for name in ("encoders_bytes", "encoding_bytes", "adapter_bytes", "activations_bytes")}
        >>> others = {"lora_bytes": 1, "checkpoint_bytes": 1, "steps": 1, "flops_per_step": 1, "trainable_parameters": 1}
        >>> estimate = Estimate(model="M", width=8, height=8, micro_batch_size=1, weights_bytes=10, **sizes, **others)
        >>> estimate.fits(12), estimate.fits(11)
        (True, False)
        """
        return self.peak_bytes <= memory_bytes

    def __str__(self) -> str:
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join([self._title(), *(f"  {name:{width}}  {value:>10}" for name, value in rows)])

    def _repr_html_(self) -> str:
        return table_html([self._title(), ""], self._rows())

    def _title(self) -> str:
        return f"{self.model}, {self.width} x {self.height} pixels, micro-batch of {self.micro_batch_size}"

    def _rows(self) -> list[tuple[str, str]]:
        sizes = {
            "weights": self.weights_bytes,
            "text encoders and VAE": self.encoders_bytes,
            "encoding": self.encoding_bytes,
            "adapter, gradients, optimizer": self.adapter_bytes,
            "activations": self.activations_bytes,
            "peak while training": self.training_bytes,
            "peak": self.peak_bytes,
            "whole pipeline on the device": self.pipeline_bytes,
            "LoRA file": self.lora_bytes,
            "checkpoint": self.checkpoint_bytes,
        }
        rows = [(name, _format_bytes(size)) for name, size in sizes.items()]
        rows += [("trainable parameters", f"{self.trainable_parameters / 1e6:.1f} M")]
        rows += [("compute per step", f"{self.flops_per_step / 1e12:.3g} TFLOP")]
        if self.seconds_per_step is not None and self.seconds is not None:
            rows += [("time per step", duration(self.seconds_per_step))]
            rows += [(f"time of {self.steps} steps", duration(self.seconds))]
        return rows


def _format_bytes(size: float) -> str:
    """A size in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
