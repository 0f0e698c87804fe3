"""Foreign models: what fails while they load is an error of ours, and weights are read from safetensors.

The other format, pickles, can run code while it is read.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError

from artaug._internal.decoding import decode_json
from artaug._internal.memory import is_out_of_memory
from artaug.errors import ArtAugError, ModelError

_ADAPTER = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ON_HUB = ("config.json", "model.safetensors.index.json", _ADAPTER, _ADAPTER_WEIGHTS)


@contextmanager
def model_errors(failure: str, *, expected: str = "") -> Iterator[None]:
    """Load a foreign model in the ``with`` block: whatever the libraries raise there is the model's fault.

    Args:
        failure: what could not be done, for the error's text, such as ``"'a/b' could not be loaded"``.
        expected: what was expected, and what to do, as sentences.

    Raises:
        ModelError: from the library's error. Errors of artaug and memory that runs out pass as they are.
    """
    try:
        yield
    except ArtAugError:
        raise
    except Exception as error:
        # tokenizers and safetensors raise plain Exceptions, other libraries nearly all there are
        if is_out_of_memory(error):
            raise
        if any(isinstance(one, HFValidationError) for one in (error, error.__cause__)):  # of a path where nothing is
            raise ModelError(
                f"{failure}: there is no such folder, and it is no name on the Hub. {expected}".rstrip()
            ) from error
        text = str(error) if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {error}"
        raise ModelError(f"{failure}: {_hub_refusal(error) or f'{text} {expected}'}".rstrip()) from error


def _hub_refusal(error: BaseException | None) -> str:
    """What the Hub's own error means, which libraries pass on as a missing file or an unknown name; without one, nothing."""
    while error is not None:
        if isinstance(error, GatedRepoError):
            return "its page on the Hub asks for a license to be accepted. Accept it there, then log in: hf auth login."
        if isinstance(error, LocalEntryNotFoundError):
            return (
                "it is not in the Hub's cache, and the Hub could not be asked. Look at the connection and at "
                "HF_HUB_OFFLINE, or give a folder that holds it."
            )
        error = error.__cause__ or error.__context__
    return ""


def check_safetensors(
    source: str | os.PathLike[str], *, fetch: Callable[[str], str | os.PathLike[str] | None] | None = None
) -> None:
    """Refuse a model whose safetensors weights are pickles by another name, which ``use_safetensors=True`` lets pass.

    diffusers and transformers choose the reader of a shard by its ending, and an index may name any file; a folder with
    an adapter of peft makes transformers load that too, pickled or not.

    Args:
        source: a folder, or a name on the Hub.
        fetch: gives the path of a file of a model of transformers on the Hub, in a folder with the others. It returns
            None or raises ``OSError`` if there is no such file.

    Raises:
        ModelError: naming the file.
    """
    folder = Path(source)
    if not folder.is_dir() and fetch is not None:
        for name in _ON_HUB:
            with suppress(OSError):
                folder = Path(fetch(name) or folder / name).parent
    if not folder.is_dir():
        return
    for index in sorted((*folder.glob("*.index*.json"), *folder.glob("*/*.index*.json"))):
        try:
            names = list(decode_json(index.read_bytes())["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is no index of weights: {error!r}. Expected JSON with a 'weight_map'.") from None
        for name in names:
            is_local = isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts
            if ".safetensors." in index.name and not (is_local and name.endswith(".safetensors")):
                raise ModelError(
                    f"{index} names {name!r:.120}, which is no safetensors file of that folder. Pickled weights can run "
                    "code when they are read: fetch the model from whoever made it, in safetensors."
                )
    for adapter in sorted((*folder.glob(_ADAPTER), *folder.glob(f"*/{_ADAPTER}"))):
        if not adapter.with_name(_ADAPTER_WEIGHTS).is_file():
            raise ModelError(
                f"{adapter} makes transformers load an adapter, and there is none in safetensors beside it. Remove it, or "
                "convert the adapter."
            )
