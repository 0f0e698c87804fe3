"""What is sent to workers: pickled here, so that neither weights nor keys travel."""

import io
import pickle
from typing import Any

from ray.cloudpickle import CloudPickler
from torch import nn

from artaug._internal.redaction import secret_in
from artaug.errors import InvalidValueError


class _Pickler(CloudPickler):
    """Pickles functions and classes of notebooks too, but no model."""

    def reducer_override(self, obj: Any) -> Any:  # noqa: ANN401 - as pickle has it
        if isinstance(obj, nn.Module):
            raise _HoldsModelError(
                f"it holds a model, a {type(obj).__name__}, and weights are not sent to workers. Build it in the function, "
                "which runs on the worker; a critic or scorer with a model becomes one of a cluster by RayCluster.critic or "
                "RayCluster.scorer."
            )
        return super().reducer_override(obj)  # type: ignore[no-untyped-call]


class _HoldsModelError(Exception):
    pass


def dumps(value: object, *, what: str) -> bytes:
    """Pickle what a worker is to get.

    Args:
        value: functions of notebooks and scripts are sent with their code.
        what: it is called, for errors.

    Raises:
        InvalidValueError: if it cannot be pickled, has a model in it, or a key, token or password: those come from the
            environment of the worker.
    """
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)  # type: ignore[no-untyped-call]
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
    return data
