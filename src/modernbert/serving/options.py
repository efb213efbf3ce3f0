"""What a server is told: its models, its limits, where it listens. Flags, keys of a YAML file and arguments alike."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from modernbert.checks import Options, option
from modernbert.errors import InputError, listed, shown
from modernbert.pipelines import ALIASES, TASKS

KEY_VARIABLE = "MODERNBERT_API_KEY"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions(Options):
    """Options of `modernbert serve` and `create_app`."""

    model: list[str] = option(
        [],
        "Model to serve, as [NAME=]FOLDER_OR_REPOSITORY[:TASK]; without a task it serves all that its head can.",
        otherwise="the package's small models",
    )
    adapter: list[str] = option(
        [],
        "Adapter of PEFT for the one model, as [NAME=]FOLDER: the model with it is served, too, by that name.",
        otherwise="none",
    )
    index: list[str] = option(
        [],
        "Index to search at /v1/search, as [NAME=]FOLDER; its model is served, too, by the same name.",
        otherwise="none",
    )
    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 is all of the machine's.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.", least=0, most=65535)
    unix_socket: str | None = option(None, "Listen on this Unix socket instead of a port.", otherwise="none")
    device: str | None = option(None, "cpu, cuda:0, or the number of a GPU.", otherwise="cpu")
    dtype: str | None = option(
        None, "Type of the weights: auto, float32, bfloat16 or float16.", otherwise="the checkpoint's"
    )
    batch_tokens: int | None = option(
        None, "Most tokens in a forward pass.", least=1, otherwise="512 on a CPU, 16,384 on a GPU"
    )
    most_waiting: int = option(
        200_000, "Tokens that may wait before more are refused with status 429.", least=1, flag="most-waiting-tokens"
    )
    most_texts: int = option(2048, "Texts of a request at the most.", least=1)
    most_bytes: int = option(16_000_000, "Bytes of a request at the most.", least=1)
    most_cache: int = option(
        2**31,
        "Bytes that the texts a model generates at one time may keep in its cache.",
        least=1,
        flag="most-cache-bytes",
    )
    timeout: float = option(60.0, "Seconds that a request may take; a header X-Timeout may ask for less.", above=0)
    truncate: bool = option(False, "Cut texts that are too long where a request does not say; otherwise refuse them.")
    api_key_file: str | None = option(
        None, "File with an API key in each line; requests need one of them.", otherwise=f"the variable {KEY_VARIABLE}"
    )
    workers: int = option(
        1, "Processes that serve, each with models of its own and a share of the CPU's cores.", least=1, most=64
    )
    tokenizer_threads: int = option(2, "Threads that tokenize.", least=1)
    access_log: bool = option(True, "Write a line of JSON for each request.")
    log_file: str | None = option(None, "File that these lines are added to.", otherwise="standard error")
    drain: float = option(
        30.0, "Seconds to finish accepted requests in after the first SIGTERM; a second signal ends at once.", least=0
    )

    def keys(self) -> list[bytes]:
        """The API keys, none where requests need none.

        Raises:
            InputError: the file cannot be read, or holds no key.
        """
        if self.api_key_file is None:
            text = os.environ.get(KEY_VARIABLE, "")
        else:
            try:
                text = Path(self.api_key_file).read_text()
            except OSError as error:
                raise InputError(f"api_key_file {self.api_key_file} cannot be read: {error.strerror}") from None
            if not text.strip():
                raise InputError(f"api_key_file {self.api_key_file} holds no key; write one into a line of it")
        return [line.strip().encode() for line in text.splitlines() if line.strip()]


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """One model to serve: its name in requests, where it is, and its task, if one is named.

    With `alone` a named task is the only one; otherwise those that the loaded model can do besides are served, too.
    """

    name: str
    source: str
    task: str | None = None
    alone: bool = True

    @classmethod
    def of_adapter(cls, given: str) -> ModelChoice:
        """Read `[NAME=]FOLDER` of an adapter; raises `InputError`."""
        name, is_named, folder = given.rpartition("=")
        if not folder or (is_named and not name):
            raise InputError(f"adapter is {given!r}; give [NAME=]FOLDER")
        return cls(name or Path(folder).name or folder, folder)

    @classmethod
    def parse(cls, given: str) -> ModelChoice:
        """Read `[NAME=]FOLDER_OR_REPOSITORY[:TASK]`; raises `InputError`."""
        name, is_named, rest = given.rpartition("=")
        source, has_task, task = rest.rpartition(":")
        if not has_task or "/" in task or (len(source) == 1 and source.isalpha()):  # a drive's letter is no folder
            source, task = rest, ""
        task = ALIASES.get(task, task)
        if task and task not in TASKS:
            raise InputError(f"model {given!r} names the task {task!r}; choose one of {', '.join([*TASKS, *ALIASES])}")
        if not source or (is_named and not name):
            raise InputError(f"model is {given!r}; give [NAME=]FOLDER_OR_REPOSITORY[:TASK]")
        if not is_named:
            name = re.sub(r"[\\/]+$", "", source)
            name = Path(name).name if Path(name).exists() else name
        return cls(name, source, task or None)


def read_options(path: str | Path) -> dict[str, Any]:
    """Options from a YAML file, whose keys are the flags' or arguments' names; `models` is another word for `model`.

    Raises:
        InputError: the file cannot be read or names what does not exist.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"config {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InputError(f"config {path} is {shown(values)}; it must be keys with values")
    found = {name.replace("-", "_"): value for name, value in values.items()}
    if "models" in found:
        found["model"] = found.pop("models")
    if "most_waiting_tokens" in found:
        found["most_waiting"] = found.pop("most_waiting_tokens")
    known = [field.name for field in dataclasses.fields(ServeOptions)]
    if unknown := sorted(set(found) - set(known)):
        raise InputError(f"config {path} names {listed(unknown)}; there are {', '.join(known)}")
    return found
