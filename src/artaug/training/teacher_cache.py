"""What a frozen teacher said, remembered by what it was asked: batches that come again need not ask twice."""

from collections.abc import Callable, Mapping

from torch import Tensor

from artaug._internal.digests import tensors_digest
from artaug.training.distributed import SINGLE_PROCESS, World


class TeacherCache:
    """Answers by question, held on the CPU as they were given.

    A question is known by its bits, so an answer is never taken for another's, whatever an objective asks and in whatever
    order; one that was not asked before, as after a resumption, is simply asked. Several processes ask unless all of them
    know: a denoiser that is sharded over them computes in step or not at all.
    """

    def __init__(self, processes: World = SINGLE_PROCESS) -> None:
        self._processes = processes
        self._answers: dict[str, Tensor] = {}

    def get_or_compute(self, asked: Mapping[str, Tensor], ask: Callable[[], Tensor]) -> Tensor:
        """The answer to a question, asked if it is not known."""
        name, device = tensors_digest(asked), next(iter(asked.values())).device
        if not self._processes.all_agree(name in self._answers, device):
            self._answers[name] = ask().detach().cpu()
        return self._answers[name].to(device)
