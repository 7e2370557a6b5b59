"""Publishes a checkpoint on the Hub, in one commit or not at all."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from ..configuration_crosslmm import CrossLMMConfig
from .conversion import REPORT, check_complete
from .export import export_with_code
from .folder import checkpoint_files, read_json, stored_tensors
from .model_card import UNTRAINED, is_hub_name, model_card

TRIES = 4


class PublishingError(RuntimeError):
    """The Hub did not accept the checkpoint. The message says what the repository has now, and what to do."""


@dataclass(frozen=True)
class PublishedFile:
    """A file to publish: its path in the repository, and its content, in a local file or in memory."""

    path: str
    content: Path | bytes

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def files_to_publish(
    folder: str | os.PathLike, repo: str, *, with_code: bool = False, untrained: bool = False
) -> list[PublishedFile]:
    """The files that `push` would publish. Nothing is written or sent.

    The card is the folder's own README.md, or else a new one; for untrained weights either begins with that fact.
    Raises FileNotFoundError for a folder that lacks a part, ValueError for weights that do not fit the config, for a
    link out of the folder, and for untrained weights without `untrained`.
    """
    folder = Path(folder).expanduser()
    config_json = read_json(folder / "config.json")
    config = CrossLMMConfig.from_pretrained(folder)
    for name in ("processor_config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"A published checkpoint must have its processor; {folder} has no {name}.")
    check_complete(stored_tensors(folder), config)
    config.untrained = is_untrained(folder, config)
    if config.untrained and not untrained:
        raise ValueError(
            f"{folder} was never trained: all gates have their initial value. Train it first, or add --untrained; its "
            "card and config then say that it is untrained."
        )
    config_json["untrained"] = config.untrained
    files = {path.name: PublishedFile(path.name, path) for path in checkpoint_files(folder)}
    written = json.dumps(config_json, indent=2, sort_keys=True) + "\n"
    files["config.json"] = PublishedFile("config.json", written.encode())
    if with_code:
        files |= {file.path: file for file in _code(files)}
    card = _card(folder, config, repo, with_code=with_code)
    files["README.md"] = PublishedFile("README.md", card.encode())
    return sorted(files.values(), key=lambda file: file.path)


def is_untrained(folder: Path, config: CrossLMMConfig) -> bool:
    """Whether a conversion made these weights and all gates still have their initial value.

    `config.untrained` is not enough, because trainers save the config unchanged.
    """
    if not config.untrained:
        return False
    gates = [tensor.read() for name, tensor in stored_tensors(folder).items() if name.endswith("2v.gate.weight")]
    initial = config.gate_init
    return all(torch.equal(gate, torch.full_like(gate, initial)) for gate in gates)


def _code(files: dict[str, PublishedFile]) -> list[PublishedFile]:
    """The modules that define the model, and the configs that name them; made without copying weights."""
    with tempfile.TemporaryDirectory() as temporary:
        bare, coded = Path(temporary) / "bare", Path(temporary) / "coded"
        bare.mkdir()
        for name in ("config.json", "processor_config.json"):
            content = files[name].content
            (bare / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        export_with_code(bare, coded)
        return [PublishedFile(path.name, path.read_bytes()) for path in sorted(coded.iterdir())]


def _card(folder: Path, config: CrossLMMConfig, repo: str, *, with_code: bool) -> str:
    if (folder / "README.md").is_file():
        card = (folder / "README.md").read_text()
        if config.untrained and UNTRAINED not in card:
            head, separator, body = card.partition("\n---\n") if card.startswith("---\n") else ("", "", card)
            card = f"{head}{separator}\n{UNTRAINED}\n\n{body.lstrip()}"
        return card
    sources = read_json(folder / REPORT)["sources"] if (folder / REPORT).is_file() else {}
    sources = {part: name if is_hub_name(name) else "a local checkpoint" for part, name in sources.items()}
    return str(model_card(config, title=repo.split("/")[-1], repo=repo, sources=sources, with_code=with_code))


def push(
    folder: str | os.PathLike,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    with_code: bool = False,
    untrained: bool = False,
    token: str | None = None,
    on_files: Callable[[list[PublishedFile]], None] | None = None,
) -> str:
    """Publishes a checkpoint folder as `repo` and returns the URL of the commit.

    revision: a branch; with it the repository, and the branch, may exist already; without it `repo` must be new.
    with_code: add the code for `trust_remote_code=True`. token: None for the one you are logged in with. on_files:
    called with the files before they are sent.
    Raises what `files_to_publish` raises, before anything is sent, and PublishingError. All files are sent in one
    commit. After a failure none is published, and a repository or branch that was created for it is removed.
    """
    try:
        files = files_to_publish(folder, repo, with_code=with_code, untrained=untrained)
    except OSError as error:
        if error.filename is None or isinstance(error, FileNotFoundError):
            raise
        raise PublishingError(f"Nothing was sent: {error}. Make room in the folder for temporary files.") from error
    if on_files is not None:
        on_files(files)
    api = HfApi(token=token)
    undo = _create(api, repo, private=private, revision=revision)
    try:
        commit = _with_retries(
            lambda: api.create_commit(
                repo,
                # An operation object can be used for one commit only, so each attempt makes new ones.
                [CommitOperationAdd(file.path, file.content) for file in files],
                commit_message="A CrossLMM checkpoint",
                revision=revision,
            )
        )
    except BaseException as error:
        remains = f"{repo} is as it was."
        try:
            undo()
        except (HTTPError, OSError):
            remains = f"an empty repository or branch remains at {api.endpoint}/{repo}: remove it."
        if isinstance(error, HTTPError | RuntimeError | ValueError | OSError):
            raise PublishingError(f"{_reason(error)} Nothing was published; {remains}") from error
        raise
    return commit.commit_url


def _create(api: HfApi, repo: str, *, private: bool, revision: str | None) -> Callable[[], None]:
    """Creates the repository and the branch if they are missing; returns a function that removes them again."""
    try:
        try:
            _with_retries(lambda: api.create_repo(repo, private=private))
            undo = lambda: api.delete_repo(repo)  # noqa: E731
        except HfHubHTTPError as error:
            if error.response.status_code != 409:
                raise
            if revision is None:
                raise PublishingError(
                    f"{repo} exists and is not changed. Choose another name, or name the branch to commit to with "
                    "--revision (such as main)."
                ) from error
            branches = {branch.name for branch in api.list_repo_refs(repo).branches}
            if revision in branches:
                return lambda: None
            undo = lambda: api.delete_branch(repo, branch=revision)  # noqa: E731
        if revision not in (None, "main"):
            api.create_branch(repo, branch=revision)
    except HTTPError as error:
        raise PublishingError(f"{_reason(error)} Nothing was published.") from error
    return undo


def _with_retries(call: Callable[[], Any]) -> Any:
    """Calls again, after a pause, if the connection or the server fails. Uploaded files are not sent again."""
    for attempt in range(1, TRIES + 1):
        try:
            return call()
        except (HTTPError, RuntimeError) as error:
            if attempt == TRIES or not _is_passing(error):
                raise
            time.sleep(2**attempt)


def _is_passing(error: Exception) -> bool:
    cause = _http_error(error)
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code in (408, 429) or 500 <= cause.response.status_code != 507
    return cause is not None


def _http_error(error: BaseException | None) -> HTTPError | None:
    """The HTTP error that caused another error, or None."""
    while error is not None and not isinstance(error, HTTPError):
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    """The cause and the remedy of an error, in one or two sentences."""
    if isinstance(error, ValueError):  # the Hub's message about the card
        return f"{error}."
    cause = _http_error(error)
    if not isinstance(cause, HfHubHTTPError):
        if cause is not None:
            return f"The connection to the Hub broke ({type(cause).__name__}: {cause}). Try again later."
        return f"{error}."
    status = cause.response.status_code
    if status == 401:
        return "The Hub does not accept the token (401). Log in with `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return "The token has no write access there (403). Create one with write access, or use your own repository."
    if status in (413, 507):
        return f"The Hub has no storage left for it ({status}: {cause.server_message}). Free storage there."
    return f"The Hub answered {status}: {cause.server_message or cause}."
