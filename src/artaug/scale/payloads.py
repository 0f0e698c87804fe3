"""What is sent to workers: pickled here, so that neither weights nor keys travel."""

import io
import pickle
from dataclasses import dataclass, replace
from typing import Any

import ray
from PIL import Image
from ray.cloudpickle import CloudPickler
from torch import nn

from artaug._internal.redaction import secret_in
from artaug.errors import InvalidValueError
from artaug.image_files import ImageFile, ImageFolder
from artaug.scale.pictures import Pixels


@dataclass(frozen=True)
class Payload:
    """A pickle, and what it refers to and Ray sends by itself.

    Pixels are apart since they look like a key sooner or later. References are apart since Ray counts only those that it
    sends: it would keep what one in a pickle refers to as long as this process lives.
    """

    data: bytes
    attachments: tuple[Any, ...] = ()


class _Pickler(CloudPickler):
    """Pickles functions and classes of notebooks too, but no model."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)  # type: ignore[no-untyped-call]
        self.attachments: list[Any] = []

    def persistent_id(self, obj: Any) -> int | None:  # noqa: ANN401 - as pickle has it
        if not isinstance(obj, Pixels | ray.ObjectRef):
            return None
        self.attachments.append(obj)
        return len(self.attachments) - 1

    def reducer_override(self, obj: Any) -> Any:  # noqa: ANN401 - as pickle has it
        if isinstance(obj, nn.Module):
            raise _HoldsModelError(
                f"it holds a model, a {type(obj).__name__}, and weights are not sent to workers. Build it in the function, "
                "which runs on the worker; a critic or scorer with a model becomes one of a cluster by RayCluster.critic or "
                "RayCluster.scorer."
            )
        if isinstance(obj, Image.Image):  # of a canvas
            return Pixels.load, (Pixels.of(obj),)
        if isinstance(obj, ImageFile | ImageFolder) and not obj.path.is_absolute():  # workers stand elsewhere
            return replace(obj, path=obj.path.absolute()).__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return super().reducer_override(obj)  # type: ignore[no-untyped-call]


class _HoldsModelError(Exception):
    pass


class _Unpickler(pickle.Unpickler):
    def __init__(self, payload: Payload) -> None:
        super().__init__(io.BytesIO(payload.data))
        self.attachments = payload.attachments

    def persistent_load(self, pid: int) -> Any:  # noqa: ANN401 - as pickle has it
        return self.attachments[pid]


def loads(payload: Payload) -> Any:  # noqa: ANN401 - what was sent
    """What a worker got."""
    return _Unpickler(payload).load()


def dumps(value: object, *, what: str) -> Payload:
    """Pickle what a worker is to get.

    Args:
        value: functions of notebooks and scripts are sent with their code.
        what: it is called, for errors.

    Raises:
        InvalidValueError: if it cannot be pickled, has a model in it, or a key, token or password: those come from the
            environment of the worker.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    try:
        pickler.dump(value)  # type: ignore[no-untyped-call]
    except _HoldsModelError as error:
        raise InvalidValueError(f"{what} cannot be sent to a worker: {error}") from None
    except Exception as error:
        raise InvalidValueError(
            f"{what} cannot be sent to a worker: {type(error).__name__}: {error}. Make what does not pickle, such as an open "
            "file, a lock or a client, in the function, which runs on the worker."
        ) from error
    data = buffer.getvalue()
    secret = secret_in(data)
    if secret is not None:
        raise InvalidValueError(
            f"{what} carries {secret}, which would travel over the network. Read it on the worker, in the function, from the "
            "environment of the worker."
        )
    return Payload(data, tuple(pickler.attachments))
