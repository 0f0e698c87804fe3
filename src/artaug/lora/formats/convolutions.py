"""How a file holds the two factors of a layer, which is how a convolution would hold them as weights of its own."""

import torch
from torch import Tensor

from artaug.errors import LoRAError
from artaug.lora.formats.low_rank import LowRank


def stored(layer: LowRank) -> tuple[Tensor, Tensor]:
    """Both factors as a file holds them: of a convolution, ``up`` is one with a kernel of 1.

    >>> import torch
    >>> from artaug.lora.formats.low_rank import LowRank
    >>> from artaug.lora.formats.convolutions import stored
    >>> [tuple(one.shape) for one in stored(LowRank(torch.ones(2, 4, 3, 3), torch.ones(8, 2)))]
    [(2, 4, 3, 3), (8, 2, 1, 1)]
    """
    return layer.down, layer.up.reshape(*layer.up.shape, *(1 for _ in layer.down.shape[2:]))


def restored(down: Tensor, up: Tensor, middle: Tensor | None = None) -> LowRank:
    """The layer that a file's factors are.

    Args:
        down: as the file holds it.
        up: as the file holds it.
        middle: of a CP decomposition, a convolution of shape (rank, rank, ...) between two of kernel 1, as LyCORIS
            calls ``lora_mid``. The two factors it makes with them are exact.

    Raises:
        LoRAError: if they are no factors of one layer.
    """
    shapes = ", ".join(str(tuple(one.shape)) for one in (down, middle, up) if one is not None)
    if down.ndim != up.ndim or any(size != 1 for size in up.shape[2:]):
        raise LoRAError(
            "low-rank factors need shapes (rank, inputs) and (outputs, rank), or those of two convolutions, the second "
            f"with a kernel of 1, as (rank, inputs, 3, 3) and (outputs, rank, 1, 1). Received {shapes}."
        )
    if middle is None:
        return LowRank(down, up.flatten(1))
    square = middle.shape[:2] == (up.shape[1], down.shape[0])
    if middle.ndim != down.ndim or not square or any(size != 1 for size in down.shape[2:]):
        raise LoRAError(
            "low-rank factors with a middle one (lora_mid) need shapes (rank, inputs, 1, 1), (rank, rank, 3, 3) and "
            f"(outputs, rank, 1, 1), whatever the middle's kernel. Received {shapes}."
        )
    return LowRank(torch.einsum("rs...,si->ri...", middle.float(), down.float().flatten(1)), up.flatten(1))
