"""A cache of the frozen teacher's predictions, so that batches used several times (``echo``) need one teacher pass."""

from collections.abc import Callable, Mapping

from torch import Tensor

from artaug._internal.digests import tensors_digest
from artaug.training.distributed import SINGLE_PROCESS, World


class TeacherCache:
    """Predictions by a digest of the teacher's inputs, held on the CPU in the dtype they came in.

    The key is the inputs' bits, so a prediction is never taken for another one's, whatever an objective asks and in
    whatever order; what is missing, as after a resumption, is computed. Several processes compute unless all of them have
    the prediction: a denoiser that is sharded over them needs all of them in every forward pass.
    """

    def __init__(self, world: World = SINGLE_PROCESS) -> None:
        self._world = world
        self._predictions: dict[str, Tensor] = {}

    def get_or_compute(self, inputs: Mapping[str, Tensor], compute: Callable[[], Tensor]) -> Tensor:
        """The prediction for ``inputs``, by ``compute`` if it is not known; on the device of the first input."""
        key, device = tensors_digest(inputs), next(iter(inputs.values())).device
        if not self._world.all_agree(key in self._predictions, device):
            self._predictions[key] = compute().detach().cpu()
        return self._predictions[key].to(device)
