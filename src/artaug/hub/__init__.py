"""A LoRA to the Hub in one commit, with a card that says where it comes from; and back."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from artaug._internal.files import file_sha256
from artaug.errors import HubError, InvalidValueError
from artaug.evaluation.comparison import Comparison
from artaug.hub.card import TAG
from artaug.hub.contents import UNIVERSAL, Parcel, listed
from artaug.hub.errors import checked_name, in_our_words
from artaug.hub.values import Base, Push, PushedFile, Sample
from artaug.lora.formats import KeyMap
from artaug.lora.lora import LoRA
from artaug.run.results import Enhancement

__all__ = ["Base", "Push", "PushedFile", "Sample", "base_of", "pull", "push"]

_MAIN = "main"
_AGAIN = "A push is one commit, so there is never half of one: try again."


def push(  # noqa: PLR0913 - a card has many parts, and each may be left out
    result: Enhancement | LoRA,
    repo: str,
    *,
    base: Base | None = None,
    multiplier: float = 1.0,
    comparison: Comparison | None = None,
    about: Mapping[str, object] = MappingProxyType({}),
    samples: Sequence[Sample] = (),
    key_map: KeyMap | None = None,
    private: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str = _MAIN,
    message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Push:
    """Upload a LoRA and its card in one commit: all of it is there afterwards, or nothing.

    What goes up: ``pytorch_lora_weights.safetensors``, which diffusers loads by the repository's name; a twin in kohya's
    names for ComfyUI and others, where the family has that format, and else the card says why not; ``README.md``; and
    the pictures of ``samples``. Nothing else: no prompts, no pictures of the run, no pickles.

    A repository that is not there is made. In one that artaug has pushed to, the same files are renewed. In any other,
    files of the same names are somebody's, and replaced only with ``overwrite``. No file is ever deleted.

    Args:
        result: the run, or a LoRA.
        repo: ``owner/name``.
        base: the model it was trained on, whose licence it inherits: ``hub.base_of("owner/base")``.
        multiplier: the strength the card recommends.
        comparison: the table on the card.
        about: objects of the run by name (critic, filter, trainer, ...), printed as their ``repr``; text as it is.
        samples: pictures with their prompts, for the gallery.
        key_map: the model family, where the layers alone do not tell it.
        private: make the repository private; one that is public already is then refused.
        overwrite: replace files that artaug did not push.
        dry_run: write the files, describe them, and send nothing. The Hub is not asked for anything.
        revision: the branch, made if it is not there.
        message: of the commit.
        token: of an account that may write; without it, the one that ``hf auth login`` has stored.
        endpoint: of another Hub than the public one.

    Returns:
        What was sent, or in a dry run would have been.

    Raises:
        InvalidValueError: for a name that is none, or a multiplier that is not finite.
        NothingToLearnError: if no round of the run was accepted.
        HubError: if the Hub refuses or cannot be reached, if the repository is public and was to be private, or if it
            holds files of other people.
    """
    if not -float("inf") < multiplier < float("inf"):
        raise InvalidValueError(f"push(multiplier={multiplier}): need a finite number.")
    api = _api(token, endpoint)
    parcel = Parcel(
        repo=checked_name(repo),
        home=api.endpoint,
        result=result,
        base=base,
        multiplier=multiplier,
        key_map=key_map,
        comparison=comparison,
        about=about,
        samples=samples,
    )
    with TemporaryDirectory(prefix="artaug-push-") as name:
        card = parcel.pack(Path(name))
        planned = Push(
            repo=repo,
            revision=revision,
            private=private,
            message=message or f"A LoRA trained with artaug {version('artaug')}",
            files=listed(Path(name)),
            card=card,
        )
        return planned if dry_run else _sent(planned, Path(name), api, overwrite=overwrite)


def pull(
    repo: str,
    *,
    file: str | None = None,
    revision: str | None = None,
    key_map: KeyMap | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> LoRA:
    """Download a LoRA. Only safetensors files are ever read.

    Args:
        repo: ``owner/name``.
        file: which file, where there are several; ``pytorch_lora_weights.safetensors`` goes first.
        revision: a branch, tag or commit.
        key_map: the model family, where the keys alone do not tell it.
        token: of an account that may read; without it, the one that ``hf auth login`` has stored.
        endpoint: of another Hub than the public one.

    Raises:
        InvalidValueError: for a name that is none.
        HubError: if the repository, the revision or the file is not there, cannot be read or is not what the Hub says
            it is, or if it is not clear which file is meant.
        LoRAError: if the file is no LoRA that artaug can read.
    """
    api = _api(token, endpoint)
    with in_our_words(f"pulling {checked_name(repo)!r}", api):
        info = api.model_info(repo, revision=revision, files_metadata=True)
        held = {one.rfilename: one for one in info.siblings or ()}
        chosen = _chosen(repo, list(held), file)
        path = Path(api.hf_hub_download(repo, chosen, revision=info.sha))
    lfs = held[chosen].lfs
    if lfs is not None:
        found = file_sha256(path)
        if found != lfs.sha256:
            raise HubError(
                f"{chosen!r} of {repo!r} has the digest {found}, and the Hub says {lfs.sha256}. Remove {path} and pull again."
            )
    return LoRA.load(path, key_map=key_map)


def base_of(repo: str, *, revision: str | None = None, token: str | None = None, endpoint: str | None = None) -> Base:
    """Read from the Hub which commit a model stands at and what licence it states.

    Raises:
        InvalidValueError: for a name that is none.
        HubError: if it is not there or cannot be read.
    """
    api = _api(token, endpoint)
    with in_our_words(f"reading about {checked_name(repo)!r}", api):
        info = api.model_info(repo, revision=revision)
    stated: Mapping[str, Any] = {} if info.card_data is None else vars(info.card_data)
    link = stated.get("license_link")
    if link is not None and "://" not in link:  # relative to the base's own repository
        link = f"{api.endpoint}/{repo}/blob/{info.sha}/{link}"
    return Base(
        repo=repo,
        revision=info.sha,
        license=stated.get("license"),
        license_name=stated.get("license_name"),
        license_link=link,
    )


def _api(token: str | None, endpoint: str | None) -> HfApi:
    return HfApi(endpoint=endpoint, token=token, library_name="artaug", library_version=version("artaug"))


def _sent(planned: Push, folder: Path, api: HfApi, *, overwrite: bool) -> Push:
    with in_our_words(f"pushing to {planned.repo!r}", api, again=_AGAIN):
        parent = _ready(planned, api, overwrite=overwrite)
        operations = [CommitOperationAdd(file.path, str(folder / file.path)) for file in planned.files]
        commit = api.create_commit(
            planned.repo,
            operations,
            commit_message=planned.message,
            revision=planned.revision,
            parent_commit=parent,
        )
    return replace(planned, commit=str(commit.commit_url))


def _ready(planned: Push, api: HfApi, *, overwrite: bool) -> str | None:
    """Make the repository and the branch where they are not there; give the commit to build on.

    Building on a commit that was looked at, the push fails if another comes in between, instead of covering it up.
    """
    try:
        info = api.model_info(planned.repo)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        api.create_repo(planned.repo, private=planned.private)
        info = api.model_info(planned.repo)
    if planned.private and not info.private:
        raise HubError(
            f"{planned.repo!r} is public, and was to be private. Make it private on its page first, or choose another."
        )
    if planned.revision != _MAIN:
        api.create_branch(planned.repo, branch=planned.revision, exist_ok=True)
        info = api.model_info(planned.repo, revision=planned.revision)
    held = {one.rfilename for one in info.siblings or ()}
    covered = sorted(held & {file.path for file in planned.files})
    if covered and TAG not in (info.tags or ()) and not overwrite:
        raise HubError(
            f"{planned.repo!r} holds {covered}, which artaug has not pushed. Choose another repository, or replace them "
            "with overwrite=True."
        )
    return info.sha


def _chosen(repo: str, held: Sequence[str], file: str | None) -> str:
    """The file to download."""
    loras = [name for name in held if name.endswith(".safetensors")]
    if file is not None and file in loras:
        return file
    if file is None and UNIVERSAL in loras:
        return UNIVERSAL
    if file is None and len(loras) == 1:
        return loras[0]
    if file is not None:
        raise HubError(f"{repo!r} has no safetensors file {file!r}. It has {loras or 'none'}.")
    if loras:
        raise HubError(f"{repo!r} has several safetensors files: {loras}. Say which: file={loras[0]!r}.")
    raise HubError(f"{repo!r} has no safetensors file, and artaug reads no other. It has {sorted(held)}.")
