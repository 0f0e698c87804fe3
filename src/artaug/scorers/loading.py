"""Shared by the scorers on models: how they load weights, all of them and from safetensors, and prepare their inputs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, final

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from artaug._internal.annotations import checked
from artaug._internal.devices import (
    DType,
    check_placement,
    computed_in,
    log_loaded,
    resolve_device,
    stored_dtype,
)
from artaug._internal.files import check_regular
from artaug._internal.images import as_rgb
from artaug._internal.truncation import warn_if_truncated
from artaug._internal.weights import check_safetensors, model_errors
from artaug.errors import InvalidValueError, ModelError

Model: TypeAlias = Any
"""A model of transformers, which is untyped here."""

TransformersProcessor: TypeAlias = Any
"""An image processor or a tokenizer of transformers."""

DEFAULT_BATCH_SIZE = 16

_NO_SAFETENSORS = """{path!r} is not a safetensors file, or not a whole one: {error}. Fetch it again if it was cut short. \
Pickled weights can run code when they are read, so they are refused. Convert them once, if you trust them: safetensors.torch.save_file(torch.load({path!r}, weights_only=True), \
"weights.safetensors"), of nested ones the part that maps names to tensors."""
_LAYOUT = "Expected the names and sizes of the published checkpoint."


@checked
@final
@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a scorer loads and runs its model: one value for every ``from_pretrained``, so that scorers can share it.

    Raises:
        InvalidValueError: if ``batch_size`` is below 1, or for a ``dtype`` or ``device`` that torch does not have.

    >>> from artaug.scorers import LoadOptions
    >>> gpu = LoadOptions(device="cuda", batch_size=64)
    """

    revision: str = "main"
    """Branch, tag or commit on the Hub."""
    device: str | torch.device = "auto"
    """Where to put the model; "auto" for the GPU where there is one, else the CPU."""
    dtype: DType = "auto"
    """Of the weights; "auto" for that of the checkpoint, on a CPU float32 in place of float16, which is slow there."""
    batch_size: int | None = None
    """Pictures, or prompts, that go through the model together; None for the scorer's own default."""

    def __post_init__(self) -> None:
        check_placement("LoadOptions", dtype=self.dtype, device=self.device)
        if self.batch_size is not None and self.batch_size < 1:
            raise InvalidValueError(f"LoadOptions(batch_size={self.batch_size}): need at least 1, or None.")

    def label(self, source: str) -> str:
        """The name of a model in tables: ``source``, with the revision if it is not main."""
        return source if self.revision == "main" else f"{source}@{self.revision}"


DEFAULT_OPTIONS = LoadOptions()


def load_model(model_class: Model, source: str | Path, options: LoadOptions) -> Model:
    """Load weights from safetensors, and all of them.

    Args:
        model_class: a class with ``from_pretrained``, such as ``CLIPModel``.
        source: a folder or a name on the Hub.
        options: the revision, device and dtype.

    Raises:
        ModelError: if there is no such model, its weights are pickled, or some are missing, which transformers would
            initialize at random.
    """
    from transformers.utils import cached_file  # noqa: PLC0415 - slow to load

    expected = (
        f"Expected a {model_class.__name__} with safetensors weights: a folder that save_pretrained wrote, or a name on the "
        "Hub."
    )
    with model_errors(f"{source!r} could not be loaded", expected=expected):
        check_safetensors(source, fetch=partial(cached_file, source, revision=options.revision))
        device = resolve_device(options.device)
        model, report = model_class.from_pretrained(
            source,
            revision=options.revision,
            dtype=options.dtype,
            device_map=None if device.type == "cpu" else {"": device},
            use_safetensors=True,
            trust_remote_code=False,  # if it is not given, transformers asks on the terminal
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{source!r} lacks {len(missing)} of the weights of {model_class.__name__}, {missing[0]!r} for one, which "
            "would be random. Expected a complete checkpoint of that class."
        )
    if options.dtype == "auto":
        model = model.to(computed_in(model.dtype, device))
    log_loaded(source, {type(model).__name__: model})
    return model.eval()


def load_image_processor(source: str | Path, *, revision: str) -> TransformersProcessor:
    """Load an image processor that resizes by Pillow, as the published scores did, with torchvision or without.

    Raises:
        ModelError: if there is none at ``source``.
    """
    from transformers import AutoImageProcessor  # noqa: PLC0415 - slow to load

    return load_part(AutoImageProcessor, source, revision=revision, backend="pil")


def load_tokenizer(source: str | Path, *, revision: str) -> TransformersProcessor:
    """Load a tokenizer.

    Raises:
        ModelError: if there is none at ``source``.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow to load

    return load_part(AutoTokenizer, source, revision=revision)


def load_config(source: str | Path, *, revision: str) -> Any:  # noqa: ANN401 - a configuration of transformers
    """Load a model's configuration, without weights.

    Raises:
        ModelError: if there is none at ``source``.
    """
    from transformers import AutoConfig  # noqa: PLC0415 - slow to load

    return load_part(AutoConfig, source, revision=revision)


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ModelError: if it cannot be read or is not a safetensors file; pickled weights are not.
    """
    try:
        check_regular(Path(path))
        Path(path).open("rb").close()  # safetensors says of a file that may not be read that there is none
        return load_file(path)
    except FileNotFoundError:
        raise ModelError(f"there is no file {str(path)!r}. Expected weights in a safetensors file.") from None
    except OSError as error:
        raise ModelError(f"{str(path)!r} cannot be read: {error}. Expected weights in a safetensors file.") from error
    except SafetensorError as error:
        raise ModelError(_NO_SAFETENSORS.format(path=str(path), error=error)) from error


def model_from_weights(
    model_class: Model,
    config: Any,  # noqa: ANN401 - a configuration of transformers
    weights: dict[str, Tensor],
    options: LoadOptions,
    *,
    source: str | Path,
    pooler: bool = True,
) -> Model:
    """Make a model of a configuration and weights: every weight it has, and no other.

    Args:
        model_class: a class of transformers.
        config: its configuration.
        weights: its state dict.
        options: the device and dtype.
        source: where the weights were read, for errors.
        pooler: whether a ``BlipTextModel`` has its pooling layer on the first token.

    Raises:
        ModelError: naming a weight that is missing, unexpected or of another shape.
    """
    device = resolve_device(options.device)
    dtype = computed_in(stored_dtype(weights), device) if options.dtype == "auto" else options.dtype
    with model_errors(f"{str(source)!r} does not fit a {model_class.__name__}", expected=_LAYOUT):
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=dtype,
            device_map=None if device.type == "cpu" else {"": device},
            output_loading_info=True,
            **({} if pooler else {"add_pooling_layer": False}),
        )
    for keys, verb in (("missing_keys", "lacks"), ("unexpected_keys", "has an unknown")):
        if names := sorted(report[keys]):
            raise ModelError(f"{str(source)!r} {verb} {names[0]!r}. {_LAYOUT}")
    log_loaded(source, {type(model).__name__: model})
    return model.eval()


def check_model(owner: object, *, model: Model, batch_size: int) -> None:
    """Refuse a model in training mode and a batch size below 1.

    Raises:
        InvalidValueError: if ``batch_size`` is below 1.
        ModelError: if the model is in training mode.
    """
    if batch_size < 1:
        raise InvalidValueError(f"{type(owner).__name__}(batch_size={batch_size}): need at least 1.")
    if model.training:
        raise ModelError(f"{type(model).__name__} is in training mode, where dropout is random. Call .eval().")


def check_counts(images: Sequence[Image.Image], prompts: Sequence[str]) -> None:
    """Refuse pictures and prompts that differ in number.

    Raises:
        InvalidValueError: naming both counts.
    """
    if len(images) != len(prompts):
        raise InvalidValueError(f"{len(images)} pictures and {len(prompts)} prompts: need one prompt a picture.")


def batch_slices(count: int, batch_size: int) -> Iterator[slice]:
    """Slices of ``batch_size`` items that cover ``count`` items; the last one may reach beyond them."""
    return (slice(start, start + batch_size) for start in range(0, count, batch_size))


def to_rgb(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures of any mode as 8-bit RGB; see `artaug._internal.images.as_rgb`.

    Raises:
        InvalidValueError: for a picture that has no pixels or no colours; a note on the error says which.
    """
    converted = []
    for number, image in enumerate(images, start=1):
        try:
            converted.append(as_rgb(image))
        except InvalidValueError as error:
            error.add_note(f"It is picture {number} of {len(images)}.")
            raise
    return converted


def pixel_values(image_processor: TransformersProcessor, images: Sequence[Image.Image], *, model: Model) -> Tensor:
    """RGB pictures as input of a model, (pictures, channels, height, width), on its device and in its dtype."""
    # Without input_data_format transformers guesses: a picture 1 or 3 pixels high would count as channels first.
    inputs = image_processor(list(images), return_tensors="pt", input_data_format="channels_last")
    values: Tensor = inputs["pixel_values"]
    return values.to(model.device, model.dtype)


def pixel_batches(
    image_processor: TransformersProcessor, images: Sequence[Image.Image], *, model: Model, batch_size: int
) -> Iterator[Tensor]:
    """Pictures of any mode as input of a model, in batches; see `to_rgb` and `pixel_values`."""
    rgb = to_rgb(images)  # all at once: a bad picture is refused before the model runs
    for batch in batch_slices(len(rgb), batch_size):
        yield pixel_values(image_processor, rgb[batch], model=model)


def tokenize(
    tokenizer: TransformersProcessor, prompts: Sequence[str], *, max_length: int, model_name: str
) -> dict[str, Tensor]:
    """Prompts as ``input_ids`` and ``attention_mask``, (prompts, max_length), padded, or truncated with a warning."""
    for prompt in dict.fromkeys(prompts):
        warn_if_truncated(prompt, reader=model_name, tokenizer=tokenizer, limit=max_length, remedy="It is not scored.")
    inputs = tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=max_length,
        return_tensors="pt",
        return_attention_mask=True,
    )
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def load_part(auto_class: Any, source: str | Path, **options: Any) -> Any:  # noqa: ANN401 - the Auto classes of transformers
    """What one of the ``Auto`` classes of transformers finds.

    Raises:
        ModelError: if there is nothing for it at ``source``.
    """
    with model_errors(f"{source!r} could not be read by {auto_class.__name__}"):
        return auto_class.from_pretrained(source, trust_remote_code=False, **options)
