"""What recipes refuse before the first picture."""

from artaug._internal.arguments import check_argument
from artaug.lora.fusing import Fuser
from artaug.training import DifferentialLoRATrainer


def check_learning(owner: str, trainer: object, objective: object, of: type, fuser: object) -> None:
    """Refuse what a recipe cannot learn with.

    Raises:
        InvalidValueError: for an argument of another type.
    """
    check_argument(owner, "trainer", trainer, DifferentialLoRATrainer)
    check_argument(owner, "objective", objective, of)
    check_argument(owner, "fuser", fuser, Fuser)
