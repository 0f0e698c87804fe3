"""The values of a push: the base model, the samples on the card, the files that are sent."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Annotated, Literal

from PIL.Image import Image
from pydantic import Field

from artaug._internal.annotations import checked
from artaug._internal.text import table_html
from artaug._internal.values import value
from artaug.errors import InvalidValueError
from artaug.hub.errors import check_repo_id

_KIB = 2**10
_LICENSE_ID = re.compile("[a-z0-9]+(?:[.+-][a-z0-9]+)*")
"""The form of the identifiers at https://huggingface.co/docs/hub/repositories-licenses."""


@value
class Base:
    """The model that a LoRA was trained on, and its licence. `base_of` reads them from the Hub.

    Raises:
        InvalidValueError: if ``repo`` is not ``owner/name``, as a path on this machine is not, or if ``license`` is no
            identifier of the Hub: the Hub would refuse the card.

    >>> from artaug import hub
    >>> hub.Base("me/tiny", license="apache-2.0")
    Base(repo='me/tiny', revision=None, license='apache-2.0', license_name=None, license_link=None)
    """

    repo: str
    """Its name on the Hub."""
    revision: str | None = None
    """The commit it was trained on."""
    license: str | None = None
    """In the words of the Hub: ``apache-2.0``, or ``other`` with a name and a link."""
    license_name: str | None = None
    license_link: str | None = None

    def __post_init__(self) -> None:
        check_repo_id(self.repo)
        if self.license is not None and not _LICENSE_ID.fullmatch(self.license):
            raise InvalidValueError(
                f"hub.Base: license={self.license!r} is no identifier of the Hub's list. Expected one such as 'apache-2.0', or "
                "'other' with license_name and license_link."
            )


@checked
@dataclass(frozen=True, kw_only=True)
class Sample:
    """An image to upload and to show on the card."""

    prompt: str
    image: Image
    """Drawn with the LoRA."""
    before: Image | None = None
    """Drawn without it, from the same seed."""


@value
class PushedFile:
    """One file of a push."""

    path: str
    """In the repository."""
    size: Annotated[int, Field(ge=0)]
    """In bytes."""
    sha256: str


@value
class Push:
    """The files sent to the Hub, or in a dry run those that would be. ``print`` it, or display it in a notebook."""

    repo: str
    revision: str
    """The branch."""
    private: bool
    message: str
    """Of the commit."""
    files: tuple[PushedFile, ...]
    """All of them, the card included."""
    card: Annotated[str, Field(repr=False)]
    """The text of README.md."""
    commit: str | None = None
    """The address of the commit; None in a dry run."""
    kind: Literal["model", "dataset"] = "model"
    """Of the repository."""

    def __str__(self) -> str:
        width = max(len(file.path) for file in self.files)
        lines = [f"  {file.path:<{width}}  {size:>12}  {file.sha256}" for file, size in self._file_sizes()]
        return "\n".join([self._headline(), *lines])

    def _repr_html_(self) -> str:
        """The files, and the text of the card."""
        table = table_html(
            ("file", "size", "sha256"), ((file.path, size, file.sha256) for file, size in self._file_sizes())
        )
        card = f"<details><summary>README.md</summary><pre>{escape(self.card)}</pre></details>"
        return f"<p>{escape(self._headline())}</p>{table}{card}"

    def _headline(self) -> str:
        visibility = "private" if self.private else "public"
        target = f"{'datasets/' * (self.kind == 'dataset')}{self.repo} ({visibility}, {self.revision})"
        return f"would push to {target}:" if self.commit is None else f"pushed to {target}, {self.commit}:"

    def _file_sizes(self) -> Iterator[tuple[PushedFile, str]]:
        for file in self.files:
            yield file, f"{file.size / _KIB:,.1f} KiB"
