"""LoKr, an update that is a Kronecker product, as the exact LoRA that it is.

LyCORIS (https://github.com/KohakuBlueleaf/LyCORIS) writes a weight's update as ``w1 (x) w2``, each a matrix or the product
of two. With ``w1 = U1 D1`` and ``w2 = U2 D2`` the mixed-product property gives a LoRA of rank ``r1 r2``:

    w1 (x) w2 = (U1 (x) U2) (D1 (x) D2)
"""

from collections.abc import Mapping

import torch
from einops import einsum
from torch import Tensor

from artaug.errors import LoRAError
from artaug.lora.formats.low_rank import LowRank, check_numel

LOKR_ROLES = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
"""What its tensors are called, after ``lokr_``: matrices, their factors, and the core of a Tucker decomposition."""


def is_complete_lokr(roles: set[str]) -> bool:
    """Whether these tensors of one layer define an update, each part of it once."""
    first, second = roles & {"w1", "w1_a", "w1_b"}, roles & {"w2", "w2_a", "w2_b", "t2"}
    return first in ({"w1"}, {"w1_a", "w1_b"}) and second in ({"w2"}, {"w2_a", "w2_b"}, {"w2_a", "w2_b", "t2"})


def lokr_rank(parts: Mapping[str, Tensor]) -> int | None:
    """The rank that alpha is divided by, as LyCORIS and ComfyUI do; None if both matrices are whole: alpha counts not then.

    Raises:
        LoRAError: if the two matrices have factors of different ranks.
    """
    ranks = {parts[role].shape[0] for role in ("w1_b", "w2_b") if role in parts}
    if len(ranks) > 1:
        raise LoRAError(f"the factors of a LoKr have ranks {sorted(ranks)}. Expected one.")
    return ranks.pop() if ranks else None


def lokr_layer(parts: Mapping[str, Tensor]) -> LowRank:
    """The update of a layer at strength 1, in float32.

    Of a convolution, ``w2`` has the kernel. If its factors have it flattened into the inputs, the shape of the kernel is
    not in the file, and the layer gets the update of a linear one.

    Raises:
        LoRAError: if shapes do not fit together, or the factors would be absurdly large.
    """
    shapes = {role: tuple(parts[role].shape) for role in LOKR_ROLES if role in parts}
    try:
        first, second = _factors(parts, "w1"), _factors(parts, "w2")
    except (IndexError, RuntimeError, ValueError):  # of torch and einops
        raise LoRAError(f"the factors of a LoKr do not fit together: {shapes}.") from None
    (up1, down1), (up2, down2) = first, second
    if not (up1.ndim == down1.ndim == up2.ndim == 2 <= down2.ndim):
        raise LoRAError(f"the factors of a LoKr do not fit together: {shapes}.")
    check_numel(up1.shape[0] * up2.shape[0], up1.shape[1] * up2.shape[1])
    check_numel(down1.shape[0] * down2.shape[0], down1.shape[1] * down2.shape[1], *down2.shape[2:])
    return LowRank(_kronecker(down1, down2), _kronecker(up1, up2))


def _kronecker(first: Tensor, second: Tensor) -> Tensor:
    """The Kronecker product of (m, n) and (p, q, kernel...): (m p, n q, kernel...). torch.kron fails on some strides."""
    kernel = second.shape[2:]
    products = first.reshape(first.shape[0], 1, first.shape[1], 1, *(1 for _ in kernel)) * second[None, :, None]
    return products.reshape(first.shape[0] * second.shape[0], first.shape[1] * second.shape[1], *kernel)


def _factors(parts: Mapping[str, Tensor], role: str) -> tuple[Tensor, Tensor]:
    """``up`` and ``down`` of one of the two matrices, with ``matrix = up @ down``."""
    if role in parts:
        return _split_whole(parts[role].float())
    up, down, core = parts[f"{role}_a"].float(), parts[f"{role}_b"].float(), parts.get("t2")
    if role == "w2" and core is not None:  # LyCORIS keeps w2_a transposed then
        check_numel(*core.shape[:1], *down.shape[1:], *core.shape[2:])
        return up.T, einsum(core.float(), down, "i j ..., j inputs -> i inputs ...")
    if up.shape[1:] != down.shape[:1]:
        raise ValueError("ranks differ")
    return up, down


def _split_whole(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (outputs, inputs, kernel...) and an identity, in the order that gives the smaller rank."""
    outputs, columns = matrix.shape[0], matrix[0].numel()
    check_numel(min(outputs, columns), max(outputs, columns))
    if outputs <= columns:
        return torch.eye(outputs), matrix
    return matrix.flatten(1), torch.eye(columns).reshape(columns, *matrix.shape[1:])
