"""What a training will take, as a value: sizes in bytes, operations, time, and how it reads."""

from dataclasses import dataclass

from artaug._internal.text import duration, table_html


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one process of a training takes, all sizes in bytes.

    Left out are the driver's own context (half a gigabyte or so), what an allocator loses between blocks, the text
    encoders' activations (less than the VAE's), and an optimizer's temporaries (less than the activations, which are gone
    by then); and of weights stored in fp8 with gradient checkpointing, up to one block's unpacked ones. A training begins
    and ends with the pipeline as it was given: one that lies on the device whole takes `pipeline_bytes` there, also where
    that is more than `peak_bytes`; one with ``enable_model_cpu_offload`` does not.
    """

    model: str
    """The pipeline's class."""
    width: int
    height: int
    micro_batch_size: int
    trainable_parameters: int
    weights_bytes: int
    """Of the denoiser, and of parts that never rest (a safety checker, say)."""
    encoders_bytes: int
    """Of the text encoders and the VAE, which wait on the CPU while the denoiser learns."""
    encoding_bytes: int
    """What encoding pictures holds at most, beside all weights."""
    adapter_bytes: int
    """The LoRA's float32 factors, their gradients, the optimizer's state, and the moving average if one is kept."""
    activations_bytes: int
    """What a forward and a backward pass hold at most, beside weights and factors."""
    lora_bytes: int
    """The file of the LoRA, as it is trained: float32."""
    checkpoint_bytes: int
    """One checkpoint: factors, the optimizer's state, the moving average."""
    steps: int
    flops_per_step: int
    """Multiplications and additions of matrix products, convolutions and attention, on average over all stages."""
    flops_per_second: float | None = None
    """What the device really does, as the caller said."""
    offloaded_bytes: int = 0
    """Of the denoiser, which waits on the CPU while pairs are encoded; none where it is tied to its device (quantized)."""

    @property
    def training_bytes(self) -> int:
        """The most memory held while the denoiser learns."""
        return self.weights_bytes + self.adapter_bytes + self.activations_bytes

    @property
    def pipeline_bytes(self) -> int:
        """What the pipeline takes where all its parts are on the device, before a training and after it."""
        return self.weights_bytes + self.encoders_bytes

    @property
    def peak_bytes(self) -> int:
        """The most memory a training holds: while the denoiser learns, or while everything is encoded before that."""
        return max(self.training_bytes, self.pipeline_bytes - self.offloaded_bytes + self.encoding_bytes)

    @property
    def seconds_per_step(self) -> float | None:
        """Time of a step, if the device's speed is known."""
        return None if self.flops_per_second is None else self.flops_per_step / self.flops_per_second

    @property
    def seconds(self) -> float | None:
        """Time of all steps, if the device's speed is known."""
        return None if self.seconds_per_step is None else self.steps * self.seconds_per_step

    def fits(self, memory_bytes: float) -> bool:
        """Whether a device of so much free memory is enough; mind what is left out above.

        >>> from artaug.diffusion import Estimate
        >>> sizes = {name: 1 for name in ("encoders_bytes", "encoding_bytes", "adapter_bytes", "activations_bytes")}
        >>> others = {"lora_bytes": 1, "checkpoint_bytes": 1, "steps": 1, "flops_per_step": 1, "trainable_parameters": 1}
        >>> told = Estimate(model="M", width=8, height=8, micro_batch_size=1, weights_bytes=10, **sizes, **others)
        >>> told.fits(12), told.fits(11)
        (True, False)
        """
        return self.peak_bytes <= memory_bytes

    def __str__(self) -> str:
        rows = self._rows()
        widest = max(len(name) for name, _ in rows)
        return "\n".join([self._title(), *(f"  {name:{widest}}  {told:>10}" for name, told in rows)])

    def _repr_html_(self) -> str:
        return table_html([self._title(), ""], self._rows())

    def _title(self) -> str:
        return f"{self.model}, {self.width} x {self.height} pixels, {self.micro_batch_size} pair(s) at once"

    def _rows(self) -> list[tuple[str, str]]:
        sizes = {
            "weights": self.weights_bytes,
            "text encoders and VAE": self.encoders_bytes,
            "encoding": self.encoding_bytes,
            "factors, gradients, optimizer": self.adapter_bytes,
            "activations": self.activations_bytes,
            "most while learning": self.training_bytes,
            "most at any time": self.peak_bytes,
            "all parts in one place": self.pipeline_bytes,
            "LoRA file": self.lora_bytes,
            "checkpoint": self.checkpoint_bytes,
        }
        rows = [(name, _readable(size)) for name, size in sizes.items()]
        rows += [("trained numbers", f"{self.trainable_parameters / 1e6:.1f} M")]
        rows += [("a step", f"{self.flops_per_step / 1e12:.3g} TFLOP")]
        if self.seconds_per_step is not None and self.seconds is not None:
            rows += [("time of a step", duration(self.seconds_per_step))]
            rows += [(f"time of {self.steps} steps", duration(self.seconds))]
        return rows


def _readable(size: float) -> str:
    """A size in the binary units that memory is sold in."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} GiB"
