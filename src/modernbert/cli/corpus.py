"""`modernbert run` and `embed` over folders, and `modernbert verify`."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from modernbert.cli.messages import InterruptedCommandError, counted, in_flags, say
from modernbert.errors import InputError, printable

_LISTED = 5  # reasons of a kind
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(?=[^/])")


def are_places(texts: Sequence[str] | None, output: Path | None, suffixes: Sequence[str]) -> bool:
    """Whether a command's texts are the folders and files of a corpus, because its output is a folder."""
    if not texts or output is None or (output.suffix.lower() in suffixes and not output.is_dir()):
        return False
    if any(_ADDRESS.match(text) or _is_there(text) for text in texts):
        return True
    is_word = not any(map(str.isspace, texts[0]))
    if is_word and (not output.suffix or output.is_dir()):  # a folder is to be written, and of nothing
        raise InputError(
            f"there is no folder or file {printable(texts[0], limit=100)}; texts are answered to {', '.join(suffixes)}"
        )
    return False


def _is_there(text: str) -> bool:
    if os.sep in text and not any(map(str.isspace, text)):
        return True  # meant as a path
    try:
        return Path(text).exists() or any(glob.iglob(text))  # noqa: PTH207 (Path.glob takes no absolute pattern)
    except (OSError, ValueError):  # no name of a file
        return False


def run_corpus(places: Sequence[str], output: Path, given: Mapping[str, Any]) -> None:
    """Answer a corpus, and say what became of it; exit code 1 where this run leaves texts without an answer."""
    from modernbert.corpus import run
    from modernbert.corpus.output import CorpusError

    place = _ADDRESS.sub(r"\1://", str(output), count=1)  # a path holds no two slashes
    try:
        report = run(list(places), place, progress=True, **given)
    except CorpusError as error:
        say(error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise InterruptedCommandError(
            f"interrupted; what is finished stays in {place}, and the same command continues after it"
        ) from None
    plural = "" if report.duplicates == 1 else "s"
    details = [f"{report.duplicates:,} duplicate{plural}"] * bool(report.duplicates)
    details += [f"{report.truncated:,} cut to the model's context"] * bool(report.truncated)
    details += [f"{report.before:,} from before"] * bool(report.before)
    more = f" ({', '.join(details)})" if details else ""
    say(f"{counted(report.rows, 'row')} read, {counted(report.texts, 'distinct text')} answered in {place}{more}")
    for reason in list(report.files.values())[:_LISTED]:
        say(in_flags(reason))
    for reason in report.reasons[:_LISTED]:
        say(in_flags(reason))
    if report.unreadable:
        say(f"{counted(report.unreadable, 'row')} could not be read; {place}/unreadable says why")
    failed = report.failed - report.failed_before
    if failed:
        say(f"{counted(failed, 'text')} could not be answered; {place}/errors has the key and the reason of each")
    if report.failed_before:
        say(
            f"{counted(report.failed_before, 'text')} could not be answered by an earlier run; --retry-failed tries "
            "again"
        )
    if failed or report.unreadable or report.files:
        raise typer.Exit(1)


def verify(
    folder: Annotated[str, typer.Argument(help="Output of `modernbert run` or `embed` over a corpus.")],
    sample: Annotated[int, typer.Option(min=0, help="Texts to compute anew; 0 checks hashes alone.")] = 64,
    seed: Annotated[int, typer.Option(help="Random seed of the sample.")] = 0,
    device: Annotated[str | None, typer.Option(help="Where to compute. (default: where the job did)")] = None,
) -> None:
    """Check the shards of a corpus by their hashes, and compute a sample of the texts anew.

    On a machine of the kind that computed them, the numbers have to be the same bits; on another one the largest
    difference is shown. The exit code is 1 if anything is not as it was written.

    Example: modernbert verify vectors/
    """
    from modernbert.corpus import verify

    report = verify(folder, sample=sample, seed=seed, device=device)
    broken = (
        f", {len(report.damaged)} damaged: {', '.join(report.damaged[:_LISTED])}" if report.damaged else ", all whole"
    )
    typer.echo(f"shards      {report.shards}{broken}")
    if report.damaged:
        place = "data/" if all(name.endswith(".parquet") for name in report.damaged) else "the output"
        typer.echo(f"            delete them from {place} and run the same command; it computes them again")
    if report.repeated:
        typer.echo(f"repeated    {counted(report.repeated, 'text')} in more than one shard")
    if report.missing and not report.damaged:  # those of damaged shards are not known
        typer.echo(f"missing     {counted(report.missing, 'text')} with neither an answer nor an error")
    if sample:
        where = "" if report.is_same_machine else "; another kind of machine or version computed them"
        typer.echo(f"sample      {counted(report.texts, 'text')}, {report.identical} with the same bits{where}")
        if report.identical < report.texts:
            typer.echo(f"difference  {report.largest:.3g} at the most")
        if report.changed:
            typer.echo(f"changed     {counted(report.changed, 'row')} of the sample whose text is not there any more")
    if not report.is_sampled:
        say(f"none of the texts of {folder} could be read again; --sample 0 checks hashes alone")
    if not report.ok:
        raise typer.Exit(1)
