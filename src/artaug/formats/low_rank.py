"""The update of one linear layer as two thin factors."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from artaug.errors import LoRAError


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update of one linear layer: ``up @ down``, nothing hidden.

    Raises:
        LoRAError: if the two factors do not share a rank of at least 1, or hold NaN or infinity.
    """

    down: Tensor
    """Shape (rank, inputs); called ``lora_A`` in PEFT files."""
    up: Tensor
    """Shape (outputs, rank); called ``lora_B`` in PEFT files."""

    def __post_init__(self) -> None:
        flat = self.down.ndim == self.up.ndim == 2
        if not (flat and self.down.shape[0] == self.up.shape[1] >= 1):
            raise LoRAError(
                f"low-rank factors need shapes (rank, inputs) and (outputs, rank) with a rank of at least 1, "
                f"received {tuple(self.down.shape)} and {tuple(self.up.shape)}."
            )
        if not (self.down.isfinite().all() and self.up.isfinite().all()):
            raise LoRAError("low-rank factors hold NaN or infinity. The training that made them diverged.")

    @property
    def rank(self) -> int:
        """Number of rows of ``down``."""
        return self.down.shape[0]

    def delta(self) -> Float[Tensor, "outputs inputs"]:
        """What is added to the layer's weight: float32, shape (outputs, inputs)."""
        return self.up.float() @ self.down.float()
