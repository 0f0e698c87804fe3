"""Foreign weights are read from safetensors: the other format, pickles, can run code while it is read."""

import os
from pathlib import Path

from artaug._internal.decoding import decode_json
from artaug.errors import ModelError

_ADAPTER = "adapter_config.json"


def check_safetensors(source: str | os.PathLike[str]) -> None:
    """Refuse a folder whose safetensors weights are pickles by another name, which ``use_safetensors=True`` lets pass.

    diffusers and transformers choose the reader of a shard by its ending, and an index may name any file; a folder with
    an adapter of peft makes transformers load that too, pickled or not. A name on the Hub is not looked up.

    Raises:
        ModelError: naming the file.
    """
    folder = Path(source)
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
        if not adapter.with_name("adapter_model.safetensors").is_file():
            raise ModelError(
                f"{adapter} makes transformers load an adapter, and there is none in safetensors beside it. Remove it, or "
                "convert the adapter."
            )
