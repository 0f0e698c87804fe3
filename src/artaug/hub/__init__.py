"""Push a LoRA to the Hub in one commit, with a model card, and pull it; push the pairs of a run as a dataset."""

import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined] # public, but not re-exported

from artaug._internal.annotations import checked
from artaug._internal.arguments import check_argument
from artaug._internal.files import file_sha256
from artaug.errors import HubError, InvalidValueError
from artaug.evaluation.comparison import Comparison
from artaug.hub.card import TAG
from artaug.hub.contents import PEFT_FILE, RepoContents, list_files
from artaug.hub.errors import check_repo_id, single_line, translate_errors
from artaug.hub.pairs import PairsContents
from artaug.hub.values import Base, Push, PushedFile, Sample
from artaug.lora.formats import KeyMap
from artaug.lora.formats.adapter_config import PEFT_CONFIG, PEFT_WEIGHTS
from artaug.lora.lora import LoRA
from artaug.run.results import Enhancement
from artaug.stored_runs import Run

__all__ = ["Base", "Push", "PushedFile", "Sample", "base_of", "pull", "push", "push_pairs"]

_MAIN = "main"
_PUSH_ADVICE = "A push is one commit, so nothing was uploaded in part: try again."


@checked
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
    """Upload a LoRA and its card in one commit: afterwards all files are there, or none.

    The files are ``pytorch_lora_weights.safetensors``, which diffusers loads by the repository's name; the same LoRA in
    kohya's format for ComfyUI and others, if the family has that format (else the card says why not); ``README.md``; and
    the images of ``samples``. Nothing else: no prompts, no images of the run, no pickles.

    A missing repository is created. In one that artaug has pushed to, the same files are replaced. In any other, files of
    the same names belong to somebody else and are replaced only with ``overwrite``. No file is ever deleted.

    Args:
        result: the run, or a LoRA.
        repo: ``owner/name``.
        base: the model it was trained on, whose licence the LoRA inherits: ``hub.base_of("owner/base")``.
        multiplier: the strength the card recommends.
        comparison: the table on the card.
        about: objects of the run by name (critic, filter, trainer, ...), printed as their ``repr``; strings as they are.
        samples: images with their prompts, for the gallery.
        key_map: the model family, if several families have these layers.
        private: create a private repository; an existing public one is then refused.
        overwrite: replace files that artaug did not push.
        dry_run: write and describe the files, and send no request to the Hub.
        revision: the branch, created if it is missing.
        message: of the commit.
        token: of an account that may write; without it, the one that ``hf auth login`` has stored.
        endpoint: URL of another Hub than the public one.

    Returns:
        The files that were sent, or would have been sent.

    Raises:
        InvalidValueError: if ``repo`` is not ``owner/name``, or the multiplier is not finite.
        NothingToLearnError: if no round of the run was accepted.
        HubError: if the Hub refuses or cannot be reached, if ``private`` is set and the repository is public, or if it
            holds files of other people.
    """
    if not -float("inf") < multiplier < float("inf"):
        raise InvalidValueError(f"push(multiplier={multiplier}): need a finite number.")
    api = _client(token, endpoint)
    contents = RepoContents(
        repo=check_repo_id(repo),
        endpoint=api.endpoint,
        result=result,
        base=base,
        multiplier=multiplier,
        key_map=key_map,
        comparison=comparison,
        about=about,
        samples=samples,
    )
    planned = Push(
        repo=repo,
        revision=revision,
        private=private,
        message=message or f"A LoRA trained with artaug {version('artaug')}",
        files=(),
        card="",
    )
    return _send(planned, contents.write, api, overwrite=overwrite, dry_run=dry_run)


@checked
def push_pairs(  # noqa: PLR0913 - as `push`
    run: Run,
    repo: str,
    *,
    dropped: bool = False,
    private: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str = _MAIN,
    message: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Push:
    """Upload the pairs of a run to a dataset in one commit: Parquet files of about 500 MB, and a card.

    ``datasets.load_dataset(repo)`` reads them, and the Hub shows them, with the pictures without loss in ``before`` and
    ``after``. The files are written to a temporary folder first, which needs as much room as the pictures have.

    Args:
        run: in a folder, from `artaug.Run.open`.
        repo: ``owner/name`` of the dataset. What is said of repositories at `push` is true of it, too.
        dropped: upload the pairs that the filter dropped as well; the column ``kept`` says which are which.
        private: see `push`, as all that follow.
        overwrite: replace files that artaug did not push.
        dry_run: write and describe the files, and send no request to the Hub.
        revision: the branch, created if it is missing.
        message: of the commit.
        token: of an account that may write.
        endpoint: URL of another Hub than the public one.

    Returns:
        The files that were sent, or would have been sent.

    Raises:
        MissingExtraError: if pyarrow is not installed.
        InvalidValueError: if ``repo`` is not ``owner/name``, or ``run`` is no run.
        NothingToLearnError: if the run has no pair yet.
        StorageError: if a file of the run is damaged, or there is no room for the files.
        HubError: see `push`.
    """
    check_argument("hub.push_pairs", "run", run, Run)
    api = _client(token, endpoint)
    contents = PairsContents(repo=check_repo_id(repo), run=run, dropped=dropped)
    planned = Push(
        repo=repo,
        revision=revision,
        private=private,
        message=message or f"Pairs drawn with artaug {version('artaug')}",
        files=(),
        card="",
        kind="dataset",
    )
    return _send(planned, contents.write, api, overwrite=overwrite, dry_run=dry_run)


@checked
def pull(
    repo: str,
    *,
    file: str | None = None,
    revision: str | None = None,
    key_map: KeyMap | None = None,
    alpha: float | None = None,
    denoiser_only: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> LoRA:
    """Download a LoRA. Only safetensors files are read, and of PEFT's adapters their ``adapter_config.json``.

    Args:
        repo: ``owner/name``.
        file: which file, where there are several; the default is ``pytorch_lora_weights.safetensors``.
        revision: a branch, tag or commit.
        key_map: the model family, if the keys fit several.
        alpha: of a file that does not state it, as in ``LoRA.load``.
        denoiser_only: leave out layers of text encoders, as in ``LoRA.load``.
        token: of an account that may read; without it, the one that ``hf auth login`` has stored.
        endpoint: URL of another Hub than the public one.

    Raises:
        InvalidValueError: if ``repo`` is not ``owner/name``.
        HubError: if the repository, the revision or the file is missing or cannot be read, if the file has another digest
            than the Hub states, or if there are several files and ``file`` does not choose one.
        LoRAError: if the file is no LoRA that artaug can read.
    """
    api = _client(token, endpoint)
    with translate_errors(f"pulling {check_repo_id(repo)!r}", api):
        info = api.model_info(repo, revision=revision, files_metadata=True)
        files = {entry.rfilename: entry for entry in info.siblings or ()}
        chosen = _choose_file(repo, list(files), file)
        path = Path(api.hf_hub_download(repo, chosen, revision=info.sha))
        folder, name = posixpath.split(chosen)
        config = posixpath.join(folder, PEFT_CONFIG)
        if name == PEFT_WEIGHTS and config in files:  # into the same folder, where LoRA.load finds it
            api.hf_hub_download(repo, config, revision=info.sha)
    lfs = files[chosen].lfs
    if lfs is not None:
        found = file_sha256(path)
        if found != lfs.sha256:
            raise HubError(
                f"{chosen!r} of {repo!r} has the digest {found}, and the Hub says {lfs.sha256}. Remove {path} and pull again."
            )
    return LoRA.load(path, key_map=key_map, alpha=alpha, denoiser_only=denoiser_only)


@checked
def base_of(repo: str, *, revision: str | None = None, token: str | None = None, endpoint: str | None = None) -> Base:
    """Read the current commit and the licence of a model from the Hub.

    Raises:
        InvalidValueError: if ``repo`` is not ``owner/name``.
        HubError: if it is missing or cannot be read.
    """
    api = _client(token, endpoint)
    with translate_errors(f"reading about {check_repo_id(repo)!r}", api):
        info = api.model_info(repo, revision=revision)
    card: Mapping[str, Any] = {} if info.card_data is None else vars(info.card_data)
    link = card.get("license_link")
    if link is not None and "://" not in link:  # relative to the base's own repository
        link = f"{api.endpoint}/{repo}/blob/{info.sha}/{link}"
    license_id, license_name = card.get("license"), None
    if isinstance(license_id, list):  # some cards list several, and a derivative's card names one
        license_id, license_name = (license_id[0], None) if len(license_id) == 1 else ("other", ", ".join(license_id))
    return Base(
        repo=repo,
        revision=info.sha,
        license=license_id,
        license_name=card.get("license_name") if license_name is None else license_name,
        license_link=link,
    )


def _client(token: str | None, endpoint: str | None) -> HfApi:
    return HfApi(endpoint=endpoint, token=token, library_name="artaug", library_version=version("artaug"))


def _send(planned: Push, write: Callable[[Path], str], api: HfApi, *, overwrite: bool, dry_run: bool) -> Push:
    """Write the files of a push to a temporary folder, whose card ``write`` returns, and upload them."""
    with TemporaryDirectory(prefix="artaug-push-") as name:
        folder = Path(name)
        card = write(folder)
        planned = replace(planned, files=list_files(folder), card=card)
        return planned if dry_run else _upload(planned, folder, api, overwrite=overwrite)


def _upload(planned: Push, folder: Path, api: HfApi, *, overwrite: bool) -> Push:
    with translate_errors(f"pushing to {planned.repo!r}", api, default_advice=_PUSH_ADVICE):
        _validate_card(planned, api)  # before a repository is created for a card that the Hub then refuses
        parent = _prepare_branch(planned, api, overwrite=overwrite)
        operations = [CommitOperationAdd(file.path, str(folder / file.path)) for file in planned.files]
        commit = api.create_commit(
            planned.repo,
            operations,
            commit_message=planned.message,
            revision=planned.revision,
            parent_commit=parent,
            repo_type=planned.kind,
        )
    return replace(planned, commit=str(commit.commit_url))


def _validate_card(planned: Push, api: HfApi) -> None:
    """Ask the Hub whether it takes this card.

    Raises:
        HubError: if it does not, with its reasons.
    """
    headers = build_hf_headers(token=api.token, library_name=api.library_name, library_version=api.library_version)
    response = get_session().post(
        f"{api.endpoint}/api/validate-yaml", json={"content": planned.card, "repoType": planned.kind}, headers=headers
    )
    if response.status_code == HTTPStatus.BAD_REQUEST:
        reply = single_line(response.text, api)
        raise HubError(f"The Hub refuses the card, so nothing was uploaded. It says: {reply}", status=400)


def _prepare_branch(planned: Push, api: HfApi, *, overwrite: bool) -> str | None:
    """Create the repository and the branch if they are missing; return the commit to build on.

    With that commit as parent, the push fails if another commit comes in between, instead of replacing its files.
    """
    look = api.model_info if planned.kind == "model" else api.dataset_info
    try:
        info = look(planned.repo)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        api.create_repo(planned.repo, private=planned.private, repo_type=planned.kind)
        info = look(planned.repo)
    if planned.private and not info.private:
        raise HubError(
            f"{planned.repo!r} is public, and private=True was given. Make it private on its page first, or choose another."
        )
    if planned.revision != _MAIN:
        api.create_branch(planned.repo, branch=planned.revision, exist_ok=True, repo_type=planned.kind)
        info = look(planned.repo, revision=planned.revision)
    present = {entry.rfilename for entry in info.siblings or ()}
    replaced = sorted(present & {file.path for file in planned.files})
    if replaced and TAG not in (info.tags or ()) and not overwrite:
        raise HubError(
            f"{planned.repo!r} holds {replaced}, which artaug has not pushed. Choose another repository, or replace them "
            "with overwrite=True."
        )
    return info.sha


def _choose_file(repo: str, files: Sequence[str], requested: str | None) -> str:
    """The file to download."""
    loras = [name for name in files if name.endswith(".safetensors")]
    if requested is not None:
        if requested not in loras:
            raise HubError(f"{repo!r} has no safetensors file {requested!r}. It has {loras or 'none'}.")
        return requested
    if PEFT_FILE in loras:
        return PEFT_FILE
    if not loras:
        raise HubError(f"{repo!r} has no safetensors file, and artaug reads no other. It has {sorted(files)}.")
    if len(loras) > 1:
        raise HubError(f"{repo!r} has several safetensors files: {loras}. Choose one: file={loras[0]!r}.")
    return loras[0]
