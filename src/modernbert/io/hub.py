"""Where files come from: a local folder, or the Hub. This is the only module that talks to the Hub."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path, PurePosixPath
from typing import Any

from modernbert.errors import CheckpointError, NotFoundError, shown
from modernbert.io.files import parse_json

ADAPTER = "adapter_config.json"
_LONGEST_NAME = 255  # characters
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def could_be_a_name(path: str) -> bool:
    """Whether a file or folder could have this name, given by a file that somebody else wrote."""
    return len(path) <= _LONGEST_NAME and path.isprintable()


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
        """The local folder that this is, or None for a repository."""
        path = Path(self.name_or_folder).expanduser()
        return path / self.subfolder if path.is_dir() else None

    def find(self, filename: str) -> Path | None:
        """A file's path on this disk, downloaded first where need be; None where the source has no such file.

        Raises:
            NotFoundError: the source itself cannot be found or reached.
            CheckpointError: the file's name leads out of the source.
        """
        parts = PurePosixPath(filename).parts
        if ".." in parts or PurePosixPath(filename).is_absolute() or "\\" in filename:
            raise CheckpointError(f"a checkpoint names the file {shown(filename)}, which lies outside of it")
        if not could_be_a_name(filename):
            raise CheckpointError(f"a checkpoint names the file {shown(filename)}, which can be no file's name")
        folder = self.folder
        if folder is not None:
            path = folder / filename
            return path if path.is_file() else None
        name = str(self.name_or_folder)
        if Path(name).expanduser().is_file():
            raise NotFoundError(f"{shown(name)} is a file; give the folder that holds the checkpoint")
        if not _REPOSITORY.fullmatch(name):
            raise NotFoundError(
                f"{shown(name)} is neither a folder on this disk nor the id of a repository (owner/name)"
            )
        return self._download(name, filename)

    def _download(self, repository: str, filename: str) -> Path | None:
        from huggingface_hub import errors as hub_errors
        from huggingface_hub import hf_hub_download

        try:
            cached_only = self.local_files_only
            if not cached_only and not self._in_cache(repository, filename):
                answer = self._ask(filename)  # once: the client goes on for half a minute where nobody answers
                if answer is False and self._is_known(repository):
                    return None
                cached_only = answer is None
            return Path(
                hf_hub_download(
                    repository,
                    filename,
                    subfolder=self.subfolder or None,
                    revision=self.revision,
                    cache_dir=self.cache_dir,
                    token=self.token,
                    local_files_only=cached_only,
                    library_name="modernbert",
                )
            )
        except hub_errors.LocalEntryNotFoundError as error:
            if self._is_known(repository):
                return None  # offline, and what is cached of the repository lacks just this file
            offline = "local_files_only is set or the Hub cannot be reached"
            raise NotFoundError(
                f"there is no folder {repository!r} on this disk, the model {repository} is not in the cache, and "
                f"{offline}; give a folder, or download it once with a connection"
            ) from error
        except hub_errors.EntryNotFoundError:
            return None
        except hub_errors.RevisionNotFoundError as error:
            raise NotFoundError(f"{repository} has no revision {self.revision!r}") from error
        except hub_errors.GatedRepoError as error:
            raise NotFoundError(f"{repository} is gated: ask for access on its page and pass token=...") from error
        except hub_errors.RepositoryNotFoundError as error:
            raise NotFoundError(
                f"there is no folder {repository!r} on this disk and no such repository on the Hub; a private one "
                "needs token=..."
            ) from error
        except hub_errors.HFValidationError as error:
            raise NotFoundError(f"{repository!r} is no folder and cannot be a repository's id: {error}") from error
        except hub_errors.HfHubHTTPError as error:
            raise NotFoundError(f"{repository}: the Hub answered {error}") from error

    def exists(self, filename: str) -> bool:
        """Whether the source has a file, without downloading it; False where that cannot be found out."""
        if self.folder is not None:
            return (self.folder / filename).is_file()
        from huggingface_hub import errors as hub_errors

        cached = self._in_cache(str(self.name_or_folder), filename)
        try:
            return cached if cached or self.local_files_only else bool(self._ask(filename))
        except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError):
            return False

    def _ask(self, filename: str) -> bool | None:
        """Whether the Hub has a file; None where nobody answers. What it answers instead is raised."""
        from huggingface_hub import HfApi
        from huggingface_hub import errors as hub_errors

        path = f"{self.subfolder}/{filename}" if self.subfolder else filename
        try:
            return HfApi().file_exists(str(self.name_or_folder), path, revision=self.revision, token=self.token)
        except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError):
            raise
        except Exception:  # of whichever HTTP library the client has
            return None

    def _is_known(self, repository: str) -> bool:
        return any(self._in_cache(repository, name, "") for name in ("config.json", "modules.json"))

    def _in_cache(self, repository: str, filename: str, subfolder: str | None = None) -> bool:
        from huggingface_hub import try_to_load_from_cache

        subfolder = self.subfolder if subfolder is None else subfolder
        path = f"{subfolder}/{filename}" if subfolder else filename
        found = try_to_load_from_cache(repository, path, cache_dir=self.cache_dir, revision=self.revision)
        return isinstance(found, str)

    def need(self, filename: str) -> Path:
        """Like `find`, but a missing file is an error.

        Raises:
            NotFoundError: the source has no such file.
            CheckpointError: it holds an adapter instead of a model.
        """
        path = self.find(filename)
        if path is None:
            self.refuse_adapter()
            where = self.folder or f"repository {self.name_or_folder}"
            raise NotFoundError(f"{where} holds no {filename}")
        return path

    def refuse_adapter(self) -> None:
        """Raise `CheckpointError` where there is an adapter, which would be left out in silence."""
        if self.exists(ADAPTER):
            raise CheckpointError(
                f"{self.folder or self.name_or_folder} holds an adapter ({ADAPTER}), which is not read here; merge it "
                "into its model with PEFT and save that: model.merge_and_unload().save_pretrained(folder)"
            )

    def read_json(self, filename: str) -> dict[str, Any]:
        """Parse a JSON file that holds one object.

        Raises:
            NotFoundError: the source has no such file.
            CheckpointError: the file is not JSON, or not an object.
        """
        value = self.read_any_json(filename)
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.need(filename)} holds a JSON {type(value).__name__}; it must be an object")
        return value

    def read_any_json(self, filename: str) -> Any:
        """Parse a JSON file, whatever it holds; raises as `read_json` does."""
        path = self.need(filename)
        try:
            return parse_json(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}") from error
