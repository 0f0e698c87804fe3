"""What scorers on models share: weights loaded without a silent gap, and pictures and prompts made ready for them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from artaug._internal.images import as_rgb
from artaug._internal.truncation import warn_if_truncated
from artaug.errors import InvalidValueError, ModelError

Model: TypeAlias = Any
"""A model of transformers, which is untyped here."""

Processor: TypeAlias = Any
"""An image processor or a tokenizer of transformers."""

_PICKLED = """{path!r} is no safetensors file. Pickled weights can run code when they are read, so they are refused. \
Convert them once, if you trust them: safetensors.torch.save_file(torch.load({path!r}, weights_only=True), \
"weights.safetensors"), of nested ones the part that maps names to tensors."""


def load_model(
    kind: Model, source: str | Path, *, revision: str, device: str | torch.device | None, dtype: torch.dtype
) -> Model:
    """Load weights from safetensors, and all of them.

    Args:
        kind: a class with ``from_pretrained``, such as ``CLIPModel``.
        source: a folder or a name on the Hub.
        revision: branch, tag or commit on the Hub.
        device: where to put the model; None for the CPU.
        dtype: of the weights.

    Raises:
        ModelError: if there is no such model, its weights are pickled, or some are missing, which transformers would
            fill with chance.
    """
    try:
        model, report = kind.from_pretrained(
            source,
            revision=revision,
            dtype=dtype,
            device_map=None if device is None else {"": device},
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as fault:
        raise ModelError(
            f"{source!r} could not be loaded: {fault} Expected a {kind.__name__} with safetensors weights: a folder "
            "that save_pretrained wrote, or a name on the Hub."
        ) from fault
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{source!r} lacks {len(missing)} of the weights of {kind.__name__}, {missing[0]!r} for one, and would "
            "score by chance. Expected a whole checkpoint of that class."
        )
    return model.eval()


def load_image_processor(source: str | Path, *, revision: str) -> Processor:
    """Load how a model wants its pictures, resized by Pillow, as the published scores were, torchvision or not.

    Raises:
        ModelError: if there is none at ``source``.
    """
    from transformers import AutoImageProcessor  # noqa: PLC0415 - slow to load

    return _loaded(AutoImageProcessor, source, revision=revision, backend="pil")


def load_tokenizer(source: str | Path, *, revision: str) -> Processor:
    """Load how a model wants its words.

    Raises:
        ModelError: if there is none at ``source``.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow to load

    return _loaded(AutoTokenizer, source, revision=revision)


def load_config(source: str | Path, *, revision: str) -> Any:  # noqa: ANN401 - a configuration of transformers
    """Load the sizes of a model, without weights.

    Raises:
        ModelError: if there are none at ``source``.
    """
    from transformers import AutoConfig  # noqa: PLC0415 - slow to load

    return _loaded(AutoConfig, source, revision=revision)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ModelError: if it is not there or no safetensors file, pickled weights included.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ModelError(f"there is no file {str(path)!r}. Expected weights in a safetensors file.") from None
    except (SafetensorError, OSError):
        raise ModelError(_PICKLED.format(path=str(path))) from None


def build(
    kind: Model,
    config: Any,  # noqa: ANN401 - a configuration of transformers
    tensors: dict[str, Tensor],
    *,
    source: str | Path,
    device: str | torch.device | None,
    dtype: torch.dtype,
    pooler: bool = True,
) -> Model:
    """A model of given sizes and weights: every weight it has, and no other.

    Args:
        kind: a class of transformers.
        config: its sizes.
        tensors: its weights.
        source: where they were read, for errors.
        device: where to put the model; None for the CPU.
        dtype: of the weights.
        pooler: whether a ``BlipTextModel`` has its last layer, which takes the first word.

    Raises:
        ModelError: naming a weight that is missing, left over or of another shape.
    """
    try:
        model, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            dtype=dtype,
            device_map=None if device is None else {"": device},
            output_loading_info=True,
            **({} if pooler else {"add_pooling_layer": False}),
        )
    except RuntimeError as fault:  # a shape that differs
        raise ModelError(f"{str(source)!r} does not fit a {kind.__name__}: {fault} {_LAYOUT}") from fault
    for trouble, verb in (("missing_keys", "lacks"), ("unexpected_keys", "has an unknown")):
        if names := sorted(report[trouble]):
            raise ModelError(f"{str(source)!r} {verb} {names[0]!r}. {_LAYOUT}")
    return model.eval()


_LAYOUT = "Expected the names and sizes of the published checkpoint."


def checked(owner: object, *, model: Model, batch_size: int) -> None:
    """Refuse what no scorer on a model can work with.

    Raises:
        InvalidValueError: if ``batch_size`` is below 1.
        ModelError: if the model is in training mode.
    """
    if batch_size < 1:
        raise InvalidValueError(f"{type(owner).__name__}(batch_size={batch_size}): need at least 1.")
    if model.training:
        raise ModelError(f"{type(model).__name__} is in training mode, where dropout is random. Call .eval().")


def matched(images: Sequence[Image.Image], prompts: Sequence[str]) -> None:
    """Refuse pictures and prompts that differ in number.

    Raises:
        InvalidValueError: naming both counts.
    """
    if len(images) != len(prompts):
        raise InvalidValueError(f"{len(images)} pictures and {len(prompts)} prompts: need one prompt a picture.")


def slices(count: int, size: int) -> Iterator[slice]:
    """The parts of ``count`` things, ``size`` at a time."""
    return (slice(start, start + size) for start in range(0, count, size))


def shown(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures of any mode as 8-bit RGB; see `artaug._internal.images.as_rgb`.

    Raises:
        InvalidValueError: for one that is no picture; a note on the error says which.
    """
    pictures = []
    for number, image in enumerate(images, start=1):
        try:
            pictures.append(as_rgb(image))
        except InvalidValueError as fault:
            fault.add_note(f"It is picture {number} of {len(images)}.")
            raise
    return pictures


def pixels(image_processor: Processor, images: Sequence[Image.Image], *, like: Model) -> Tensor:
    """Pictures as a model takes them, (pictures, channels, height, width), on its device and of its type."""
    # Said, since transformers guesses, and takes a picture 1 or 3 pixels high for one with its channels first.
    inputs = image_processor(list(images), return_tensors="pt", input_data_format="channels_last")
    values: Tensor = inputs["pixel_values"]
    return values.to(like.device, like.dtype)


def tokens(tokenizer: Processor, prompts: Sequence[str], *, limit: int, reader: str) -> dict[str, Tensor]:
    """Prompts as ``input_ids`` and ``attention_mask``, (prompts, limit), padded, and cut with a warning."""
    for prompt in dict.fromkeys(prompts):
        warn_if_truncated(prompt, reader=reader, tokenizer=tokenizer, limit=limit, remedy="It is not scored.")
    inputs = tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=limit,
        return_tensors="pt",
        return_attention_mask=True,
    )
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def _loaded(kind: Any, source: str | Path, **options: Any) -> Any:  # noqa: ANN401 - the Auto classes of transformers
    try:
        return kind.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as fault:
        raise ModelError(f"{source!r} has nothing for {kind.__name__}: {fault}") from fault
