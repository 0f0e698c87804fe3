"""Optional packages: one that is missing is told from one that is installed and broken."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from artaug.errors import MissingExtraError


def check_installed(package: str, *, required_by: str, extra: str | None = None) -> None:
    """Look for an optional package, and import nothing.

    Raises:
        MissingExtraError: if it is not installed.
    """
    if find_spec(package) is None:
        raise MissingExtraError(required_by, package=package, extra=extra)


@contextmanager
def optional(package: str, *, required_by: str, extra: str | None = None) -> Iterator[None]:
    """Import an optional package in the ``with`` block.

    Args:
        package: its name, as it is imported and as pip knows it.
        required_by: the part of artaug that needs it.
        extra: the extra of artaug that brings it.

    Raises:
        MissingExtraError: if it is not installed.
        ImportError, OSError, RuntimeError: what it raised itself if it is installed and cannot be imported (a wrong CUDA
            library, a version that does not fit), with a note that says so.

    >>> from artaug._internal.extras import optional
    >>> with optional("no_such_package", required_by="This example"):
    ...     import no_such_package
    Traceback (most recent call last):
    artaug.MissingExtraError: This example needs the no_such_package package. Run: pip install no_such_package
    """
    check_installed(package, required_by=required_by, extra=extra)
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        error.add_note(
            f"{required_by} needs the {package} package, which is installed but cannot be imported. "
            f"Reinstall it in a version that fits this machine: pip install --force-reinstall {package}"
        )
        raise
