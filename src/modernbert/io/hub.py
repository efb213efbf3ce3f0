"""Where files come from: a local folder, or the Hub. This is the only module that talks to the Hub."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path, PurePosixPath
from typing import Any

from modernbert.errors import CheckpointError, NotFoundError, shown
from modernbert.io.files import parse_json

ADAPTER = "adapter_config.json"
_LONGEST_NAME = 255  # characters
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def check_name(path: str, what: str, where: object) -> None:
    """Raise `CheckpointError` for a name of a file or folder, given by a checkpoint, that none inside of it has."""
    pure = PurePosixPath(path)
    if ".." in pure.parts or pure.is_absolute() or "\\" in path:
        raise CheckpointError(f"{where} names the {what} {shown(path)}, which lies outside of it")
    if len(path) > _LONGEST_NAME or not path.isprintable():
        raise CheckpointError(f"{where} names the {what} {shown(path)}, which can be no {what}'s name")


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
    """

    name_or_folder: str | Path
    revision: str | None = None
    subfolder: str = ""
    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False

    @classmethod
    def pop_from(cls, name_or_folder: str | Path, kwargs: dict[str, Any]) -> Source:
        """Take this class's own arguments out of `kwargs`."""
        names = [f.name for f in dataclasses.fields(cls)][1:]
        given = {name: kwargs.pop(name) for name in names if name in kwargs}
        return cls(name_or_folder, **{**given, "subfolder": given.get("subfolder") or ""})

    def inside(self, path: str) -> Source:
        """A folder of this source as a source of its own; "" is this one."""
        return dataclasses.replace(self, subfolder="/".join(filter(None, [self.subfolder, path])))

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
            if not cached_only and not self._in_cache(self._path(filename)):
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

    def refuse_adapter(self) -> None:
        """Raise `CheckpointError` if there is an adapter, which would be left out in silence."""
        if self.exists(ADAPTER):
            raise CheckpointError(
                f"{self.folder or self.name_or_folder} holds an adapter ({ADAPTER}), which is not read here; merge it "
                "into its model with PEFT and save that: model.merge_and_unload().save_pretrained(folder)"
            )

    def read_json(self, filename: str) -> dict[str, Any]:
        """Parse a JSON file that holds one object; raises `CheckpointError` if it does not, or there is none."""
        value = self.read_any_json(filename)
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.need(filename)} holds a JSON {type(value).__name__}; it must be an object")
        return value

    def read_any_json(self, filename: str) -> Any:
        """Parse a JSON file, whatever it holds."""
        path = self.need(filename)
        try:
            return parse_json(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from error
