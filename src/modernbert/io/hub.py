"""Where files come from: a local folder, or the Hub. This is the only module that talks to the Hub."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import inspect
import logging
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from modernbert.errors import CheckpointError, InputError, NotFoundError, printable, shown
from modernbert.io.files import parse_json

ADAPTER = "adapter_config.json"
_LONGEST_NAME = 255  # characters
logger = logging.getLogger(__name__)

# What transformers takes where checkpoints are read and written, and has no meaning here; why.
_MEANINGLESS = {
    **dict.fromkeys(("trust_remote_code", "code_revision"), "nothing that comes with a checkpoint is ever executed"),
    **dict.fromkeys(("low_cpu_mem_usage", "_fast_init", "disable_mmap"), "weights are always read one at a time"),
    **dict.fromkeys(("max_memory", "offload_folder", "offload_state_dict", "offload_buffers"), "nothing is offloaded"),
    **dict.fromkeys(("use_safetensors", "weights_only", "safe_serialization"), "weights are safetensors, always"),
    **dict.fromkeys(("use_fast", "from_slow", "tokenizer_type", "legacy_format"), "there is one kind of tokenizer"),
    **dict.fromkeys(("save_peft_format", "save_original_format", "save_function"), "there is one format"),
    **dict.fromkeys(("proxies", "mirror", "user_agent", "resume_download"), "the Hub's own client says how it loads"),
    **dict.fromkeys(("_from_auto", "_from_pipeline", "_commit_hash", "adapter_kwargs", "tqdm_class"), "it is not used"),
    **dict.fromkeys(("use_kernels", "allow_all_kernels", "tags"), "it is not used"),
}
# What cannot be served, unless it is off.
_REFUSED = {
    **dict.fromkeys(("from_tf", "from_flax", "gguf_file"), "weights are read from safetensors alone"),
    **dict.fromkeys(("tp_plan", "tp_size", "device_mesh", "distributed_config"), "a model is loaded onto one device"),
    **dict.fromkeys(("key_mapping", "fusion_config", "kernel_config"), "tensors keep their names"),
    "distributed_checkpoint": "weights are written by one process",
    "use_flash_attention_2": "attn_implementation='flash_attention_2' says so",
}


def drop_meaningless(kwargs: dict[str, Any]) -> None:
    """Take transformers' arguments that mean nothing here out of `kwargs`, with a line of log for each that is on.

    Raises:
        InputError: one cannot be served.
    """
    for name in [name for name in kwargs if name in _MEANINGLESS or name in _REFUSED]:
        value = kwargs.pop(name)
        if name in _REFUSED and value not in (None, False):
            raise InputError(f"{name} is {shown(value)}; {_REFUSED[name]}, so leave it out")
        if name in ("use_safetensors", "safe_serialization") and value is False:
            logger.warning("%s=False changes nothing: %s", name, _MEANINGLESS[name])
        elif value not in (None, False, {}) and name in _MEANINGLESS:
            logger.info("%s changes nothing: %s", name, _MEANINGLESS[name])


_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def check_name(path: str, what: str, where: object) -> None:
    """Raise `CheckpointError` for a name of a file or folder, given by a checkpoint, that none inside of it has."""
    pure = PurePosixPath(path)
    if ".." in pure.parts or pure.is_absolute() or "\\" in path:
        raise CheckpointError(f"{where} names the {what} {shown(path)}, which lies outside of it")
    if len(path) > _LONGEST_NAME or not path.isprintable():
        raise CheckpointError(f"{where} names the {what} {shown(path)}, which can be no {what}'s name")


def cache_folder() -> tuple[Path, bool]:
    """Where the Hub's client keeps what it downloads, and whether it was told to stay offline."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE), bool(constants.HF_HUB_OFFLINE)


@dataclasses.dataclass(frozen=True)
class Source:
    """A local folder or a repository on the Hub, and how to reach it.

    Args:
        name_or_folder: an existing folder, or a repository id such as "answerdotai/ModernBERT-base".
        revision: branch, tag or commit of the repository.
        subfolder: folder inside it that holds the files.
        cache_dir: where downloads are kept, instead of the Hub client's own cache.
        token: access token; True takes the one that the Hub client has stored, False sends none.
        local_files_only: take what the cache has and never ask the network.
        force_download: download what the cache has already, too.
    """

    name_or_folder: str | Path
    revision: str | None = None
    subfolder: str = ""
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    force_download: bool = False

    @classmethod
    def pop_from(cls, name_or_folder: str | Path, kwargs: dict[str, Any]) -> Source:
        """Take this class's own arguments out of `kwargs`, and those that mean nothing here."""
        drop_meaningless(kwargs)
        if (older := kwargs.pop("use_auth_token", None)) is not None:
            kwargs.setdefault("token", older)
        names = [f.name for f in dataclasses.fields(cls)][1:]
        given = {name: kwargs.pop(name) for name in names if name in kwargs}
        return cls(name_or_folder, **{**given, "subfolder": given.get("subfolder") or ""})

    def inside(self, path: str) -> Source:
        """A folder of this source as a source of its own; "" is this one."""
        return dataclasses.replace(self, subfolder="/".join(filter(None, [self.subfolder, path])))

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of a `from_pretrained` that reads from here."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"pretrained_model_name_or_path": values.pop("name_or_folder"), **values}

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a repository."""
        path = Path(self.name_or_folder).expanduser()
        return path / self.subfolder if path.is_dir() else None

    def find(self, filename: str) -> Path | None:
        """A file's path on this disk, downloaded first if need be; None if the source has no such file.

        Raises:
            NotFoundError: the source itself cannot be found or reached.
            CheckpointError: the file's name leads out of the source.
        """
        check_name(filename, "file", "a checkpoint")
        if (folder := self.folder) is not None:
            return folder / filename if (folder / filename).is_file() else None
        name = str(self.name_or_folder)
        if Path(name).expanduser().is_file():
            raise NotFoundError(f"{shown(name)} is a file; give the folder that holds the checkpoint")
        if not _REPOSITORY.fullmatch(name):
            raise NotFoundError(
                f"{shown(name)} is neither a folder on this disk nor the id of a repository (owner/name)"
            )
        return self._download(name, filename)

    def _path(self, filename: str) -> str:
        return f"{self.subfolder}/{filename}" if self.subfolder else filename

    def _download(self, repository: str, filename: str) -> Path | None:
        from huggingface_hub import errors, hf_hub_download

        try:
            cached_only = self.local_files_only
            if not cached_only and (self.force_download or not self._in_cache(self._path(filename))):
                answer = self._ask(filename)  # once: the client tries for half a minute if there is no answer
                if answer is False and self._is_known():
                    return None
                cached_only = answer is None
            return Path(
                hf_hub_download(
                    repository,
                    self._path(filename),
                    revision=self.revision,
                    cache_dir=self.cache_dir,
                    token=self.token,
                    local_files_only=cached_only,
                    force_download=self.force_download and not cached_only,
                    library_name="modernbert",
                )
            )
        except errors.EntryNotFoundError as error:
            if not isinstance(error, errors.LocalEntryNotFoundError) or self._is_known():
                return None  # perhaps offline, and what is cached of the repository lacks just this file
            raise NotFoundError(
                f"there is no folder {repository!r} on this disk, no such model in the cache, and the Hub cannot be "
                "reached (or local_files_only is set); give a folder, or run this once with a connection to the Hub"
            ) from error
        except (errors.HfHubHTTPError, errors.HFValidationError) as error:
            missing = f"there is no folder {repository!r} on this disk and no such repository on the Hub"
            reasons = {
                errors.RevisionNotFoundError: f"{repository} has no revision {self.revision!r}",
                errors.GatedRepoError: f"{repository} is gated: ask for access on its page and pass token=...",
                errors.RepositoryNotFoundError: f"{missing}; a private one needs token=...",
                errors.HFValidationError: f"{repository!r} is no folder and cannot be a repository's id: {error}",
                errors.HfHubHTTPError: f"{repository}: the Hub answered {error}",
            }
            raise NotFoundError(next(text for kind, text in reasons.items() if isinstance(error, kind))) from error

    def exists(self, filename: str) -> bool:
        """Whether the source has a file, without downloading it; False if that cannot be found out."""
        if self.folder is not None:
            return (self.folder / filename).is_file()
        from huggingface_hub import errors

        with contextlib.suppress(errors.HfHubHTTPError, errors.HFValidationError):
            return self._in_cache(self._path(filename)) or (not self.local_files_only and bool(self._ask(filename)))
        return False

    def _ask(self, filename: str) -> bool | None:
        """Whether the Hub has a file; None if it does not answer. Its refusals are raised."""
        from huggingface_hub import HfApi, errors

        name, path = str(self.name_or_folder), self._path(filename)
        try:
            return HfApi().file_exists(name, path, revision=self.revision, token=self.token)
        except (errors.HfHubHTTPError, errors.HFValidationError):
            raise
        except Exception:  # of whichever HTTP library the client has
            return None

    def _is_known(self) -> bool:
        return self._in_cache("config.json") or self._in_cache("modules.json")

    def _in_cache(self, path: str) -> bool:
        from huggingface_hub import try_to_load_from_cache

        name = str(self.name_or_folder)
        return isinstance(try_to_load_from_cache(name, path, cache_dir=self.cache_dir, revision=self.revision), str)

    def need(self, filename: str) -> Path:
        """Like `find`; raises `NotFoundError` for a missing file, `CheckpointError` if there is an adapter instead."""
        path = self.find(filename)
        if path is None:
            self.refuse_adapter()
            raise NotFoundError(f"{self.folder or f'repository {self.name_or_folder}'} holds no {filename}")
        return path

    @functools.cached_property
    def is_adapter(self) -> bool:
        """Whether it holds an adapter; the Hub is asked once."""
        return self.exists(ADAPTER)

    def refuse_adapter(self) -> None:
        """Raise `CheckpointError` if there is an adapter, which would be left out in silence."""
        if self.is_adapter:
            raise CheckpointError(
                f"{self.folder or self.name_or_folder} holds an adapter ({ADAPTER}), which changes what other weights "
                "give; load it onto its base: from_pretrained(base, adapter=...)"
            )

    def base_of_adapter(self) -> Source | None:
        """The checkpoint that an adapter says it was trained on; None if there is no adapter here.

        Raises:
            CheckpointError: it names none.
            NotFoundError: it names a folder that is not on this disk.
        """
        if not self.is_adapter:
            return None
        values, here = self.read_json(ADAPTER), str(self.folder or self.name_or_folder)
        base = values.get("base_model_name_or_path")
        give = f"give its base: from_pretrained(base, adapter={here!r})"
        if not isinstance(base, str) or not base:
            raise CheckpointError(f"{here} holds an adapter ({ADAPTER}) with base_model_name_or_path {base!r}; {give}")
        if not _REPOSITORY.fullmatch(base) and not Path(base).expanduser().is_dir():
            raise NotFoundError(f"{here} holds an adapter of {shown(base)}, and there is no such folder here; {give}")
        revision = values.get("revision")
        revision = revision if isinstance(revision, str) else None
        return dataclasses.replace(self, name_or_folder=base, revision=revision, subfolder="")

    def holding(self, filename: str) -> Source:
        """This source; or if it lacks a file and is an adapter, its base, which is used with that file."""
        if self.find(filename) is not None:
            return self
        return self.base_of_adapter() or self

    def read_json(self, filename: str) -> dict[str, Any]:
        """Parse a JSON file that holds one object; raises `CheckpointError` if it does not, or there is none."""
        return read_object(self.need(filename))

    def read_any_json(self, filename: str) -> Any:
        """Parse a JSON file, whatever it holds."""
        return _parsed(self.need(filename))


def _parsed(path: Path) -> Any:
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds one object; raises `CheckpointError` if it does not."""
    value = _parsed(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; it must be an object")
    return value


class Saved(abc.ABC):
    """What is saved into a folder, and pushed to the Hub."""

    @abc.abstractmethod
    def _write(self, folder: Path, options: Mapping[str, Any]) -> list[Path]:
        """Write all files into a folder, which is made where missing; returns them."""

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, **kwargs: Any
    ) -> tuple[str, ...]:
        """Write everything that `from_pretrained` reads into a folder, which is made where missing.

        Args:
            save_directory: the folder.
            push_to_hub: upload the files, too.
            kwargs: `repo_id`, by default the folder's name, and the other arguments of `push_to_hub`.

        Returns:
            The files.
        """
        return self._save(save_directory, {}, push_to_hub, kwargs)

    def _save(
        self, save_directory: str | Path, options: Mapping[str, Any], push_to_hub: bool, kwargs: dict[str, Any]
    ) -> tuple[str, ...]:
        folder = Path(save_directory)
        drop_meaningless(kwargs)
        if unknown := sorted(kwargs.keys() - _UPLOADING):
            raise TypeError(f"save_pretrained of a {type(self).__name__} has no argument {', '.join(unknown)}")
        files = self._write(folder, options)
        if push_to_hub:
            kwargs.setdefault("commit_message", f"Upload {type(self).__name__}")
            _upload(kwargs.pop("repo_id", None) or folder.resolve().name, folder, files, **kwargs)
        return tuple(map(str, files))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Upload what `save_pretrained` writes to a repository on the Hub, which is made where missing.

        Args:
            repo_id: such as "owner/name"; without an owner it is the token's.
            commit_message, commit_description: by default "Upload " and the class's name.
            private: whether a repository that is made is private.
            token: as for `from_pretrained`; it must allow writing.
            revision: the branch, which is made where missing.
            create_pr: open a pull request instead of committing to the branch.
            kwargs: arguments of `save_pretrained`.

        Returns:
            What huggingface_hub says of the commit: `commit_url`, `oid`, `pr_url`, ...

        Raises:
            CheckpointError: the Hub refuses, or cannot be reached.
        """
        commit: dict[str, Any] = {
            "commit_message": commit_message or f"Upload {type(self).__name__}",
            "revision": revision,
        }
        commit |= {"commit_description": commit_description, "create_pr": create_pr}
        with tempfile.TemporaryDirectory() as folder:
            files = self.save_pretrained(folder, **kwargs)
            return _upload(repo_id, Path(folder), files, private=private, token=token, **commit)


_UPLOADING = inspect.signature(Saved.push_to_hub).parameters.keys() - {"self", "kwargs"}


def _upload(
    repo_id: str,
    folder: Path,
    files: Iterable[str | Path],
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    **commit: Any,
) -> Any:
    """Commit files of a folder; `commit` are arguments of `HfApi.create_commit`."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token, library_name="modernbert")
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if commit.get("revision") is not None and not commit.get("create_pr"):
            api.create_branch(repo_id, branch=commit["revision"], exist_ok=True)
        added = [CommitOperationAdd(Path(file).relative_to(folder).as_posix(), file) for file in files]
        return api.create_commit(repo_id, added, **commit)
    except Exception as error:  # of whichever HTTP library the client has
        reason = printable(str(error), limit=200) or type(error).__name__
        raise CheckpointError(
            f"{repo_id} was not pushed to the Hub, which wants token=... to write: {reason}"
        ) from error
