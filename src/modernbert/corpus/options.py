"""Options of a job over a corpus. Nothing here imports torch."""

from __future__ import annotations

import dataclasses

from modernbert.checks import Options, option
from modernbert.errors import InputError

OF_ROWS = ("file", "row", "key")  # columns that rows/ has itself
STORED = ("float32", "float16", "int8", "bits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusOptions(Options):
    """What a job over a corpus does beside its task: what is read, how it is kept, and what runs it."""

    column: list[str] = option([], "Column that holds the text, or FIELD=COLUMN for another field.", otherwise="text")
    keep: list[str] = option([], "Column to keep beside the key of each row, such as id.")
    store: str = option("float32", "How numbers of vectors are stored.", choices=STORED)
    format: str = option("parquet", "Form of the output.", choices=("parquet", "lance"))
    shard_size: int | None = option(
        None, "Most texts of a shard.", least=1, otherwise="4,096, and 256 with a vector for every token"
    )
    retry_failed: bool = option(False, "Try texts again that an earlier run of this job could not answer.")
    engine: str = option("local", "What runs the job: local or ray.", otherwise="local, processes of this machine")
    engine_options: list[str] = option(
        [],
        "NAME=VALUE sets an option of the engine: processes or threads of local; actors, cpus or address of ray.",
        flag="engine-option",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.keep:
            if name in OF_ROWS:
                raise InputError(f"keep names {name!r}, which rows/ has itself; rename the column")
