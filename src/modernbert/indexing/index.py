"""An index: made of folders and files, kept up to date by their content, and searched."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from modernbert.checks import check_text
from modernbert.errors import InputError, printable, shown
from modernbert.indexing.documents import SUFFIXES, Document, read_documents
from modernbert.indexing.options import IndexOptions, SearchOptions
from modernbert.indexing.passages import Span, Tokens, passages_of, windows_of
from modernbert.indexing.store import Passage, Store
from modernbert.io.files import locked, parse_json, write_text
from modernbert.io.fingerprint import digest as digest_of_file
from modernbert.io.fingerprint import fingerprint
from modernbert.io.hub import Source
from modernbert.io.tables.reading import library
from modernbert.pipelines import pipeline, small_model_of

if TYPE_CHECKING:
    from modernbert.pipelines.sentence_embedding import SentenceEmbeddingPipeline

logger = logging.getLogger(__name__)

MANIFEST = "modernbert-index.json"
_FORMAT = 1
_TOGETHER = 256  # passages that are embedded and stored in one step, which is what an interruption costs
_SMALL_WEIGHT = 0.5  # of the list that the package's sentence encoder gives, which knows less than words do
_SLACK = 16  # tokens that a part of a text may have more alone than within it


@dataclasses.dataclass
class IndexReport:
    """What a run did.

    Attributes:
        added, changed, removed, unchanged: files.
        failed: files that could not be read, with the reason; what the index had of them stays.
        embedded: passages that were embedded.
        passages: that the index holds now.
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    embedded: int = 0
    passages: int = 0


@dataclasses.dataclass(frozen=True)
class Result:
    """A passage that was found.

    Attributes:
        text: the passage.
        score: of the reranker where there is one; otherwise of the fusion, a similarity, or BM25. Higher is better.
        path: the file.
        start, end: its characters in the text of the file, or of the row.
        page: of a PDF, from 1; None elsewhere.
        row: of a table, from 1; None elsewhere.
        columns: the other columns of the row.
        marks: characters [start, end) of the passage that hold words of the question.
    """

    text: str
    score: float
    path: str
    start: int
    end: int
    page: int | None
    row: int | None
    columns: dict[str, Any]
    marks: list[Span]

    @property
    def place(self) -> str:
        """The file and where in it, for people."""
        path = os.path.relpath(self.path)
        where = (
            f"page {self.page}"
            if self.page
            else f"row {self.row}"
            if self.row
            else f"characters {self.start}-{self.end}"
        )
        return f"{self.path if path.startswith('..') else path}, {where}"


class Pending(NamedTuple):
    """A document on its way into the index."""

    path: str
    document: Document
    is_known: bool  # whether something else is stored in its place
    passages: list[Span]
    items: list[Any]  # what the model reads: passages, or windows with the spans of several


def build_index(
    places: str | Path | Sequence[str | Path],
    output: str | Path,
    model: str | Path | None = None,
    *,
    device: Any = None,
    progress: bool = False,
    **options: Any,
) -> IndexReport:
    """Make an index of documents, or bring one up to date: only files whose content changed are embedded.

    Files that are not there any more are removed, if they were below one of the places. What is done is stored every
    few seconds; after an interruption, whatever ended the process, the same call goes on from there.

    Args:
        places: folders and files: .txt, .md, .html, .pdf, .jsonl, .csv, .tsv and .parquet. Files and folders whose
            names begin with a dot are left out.
        output: folder of the index, made where missing.
        model: encoder, a folder or a Hub repository; by default the one that the index was made with, or the small
            sentence encoder of the package.
        device: where to compute.
        progress: draw a progress bar on standard error.
        options: those of `IndexOptions`; by default those that the index was made with.

    Raises:
        InputError: a place cannot be found, the folder holds something else, or the index was made with another model
            or other options.
    """
    output = Path(output)
    for name in ("sentencex", "lancedb"):
        library(name, output, "search")
    if not (output / MANIFEST).is_file():
        _files(output, _roots(places), ())
    with locked(output.resolve(), f"another process writes to {output}; wait for it"):
        return Index._made(output, model, options, device).update(places, progress)


def open_index(
    folder: str | Path, model: str | Path | None = None, reranker: str | Path | None = None, *, device: Any = None
) -> Index:
    """Open an index to search it.

    Args:
        folder: of the index.
        model: where the index's model is now, if it was moved.
        reranker: a model of text-ranking that reads the best passages, a folder or a Hub repository.
        device: where to compute.

    Raises:
        InputError: it is no index, or the model is another one.
    """
    folder = Path(folder)
    library("lancedb", folder, "search")
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder} is no index; modernbert index FOLDER --output {folder} makes one")
    index = Index(folder, _read_manifest(folder), model, device)
    if reranker is not None:
        index.reranker = pipeline("text-ranking", reranker, device=device)
    return index


class Index:
    """An index on disk; `open_index` opens one.

    Attributes:
        folder: where it is.
        manifest: the model's name and fingerprint, the options, and versions that it was made with.
        reranker: a pipeline of text-ranking, or None.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], model: Any = None, device: Any = None) -> None:
        self.folder, self.manifest, self.device = folder, manifest, device
        self.options = IndexOptions.of(manifest["options"], f"{folder / MANIFEST}")
        self.model_name: str | None = manifest["model"] if model is None else str(model)
        self.reranker: Any = None
        self._pipeline: SentenceEmbeddingPipeline | None = None
        self._store: Store | None = None

    @classmethod
    def _made(cls, folder: Path, model: Any, given: dict[str, Any], device: Any) -> Index:
        """The index in a folder, new or old, if the model and the options are its own."""
        options = IndexOptions.of(given, "an index")
        if (folder / MANIFEST).is_file():
            index = cls(folder, _read_manifest(folder), model, device)
            for name in given:
                now, then = getattr(options, name), getattr(index.options, name)
                if now != then and given[name] is not None:
                    raise InputError(
                        f"{name} is {shown(now)}, and {folder} was made with {shown(then)}, which it keeps; "
                        "leave it out, or name another folder for another index"
                    )
            if index.model_name is None or Path(index.model_name).is_dir():
                index.check_model()
            return index
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} is no index and not empty; name a new folder, or an empty one")
        versions = {name: version(name) for name in ("modernbert", "torch", "tokenizers", "lancedb")}
        kept: str | None = None if model is None else str(Path(model).resolve()) if Path(model).is_dir() else str(model)
        manifest = {"format": _FORMAT, "model": kept, "fingerprint": None, "options": dataclasses.asdict(options)}
        index = cls(folder, manifest, None, device)
        encoder = index.encoder
        if (similarity := encoder.embedding.similarity) not in Store.METRICS:
            raise InputError(f"the model compares vectors by {similarity}; an index has {', '.join(Store.METRICS)}")
        if not encoder.embedding.poolings:
            raise InputError("the model has a vector for every token and pools none; an index needs one of a passage")
        manifest |= {"fingerprint": _fingerprint(index.model_name), "dimensions": index.dimensions}
        manifest |= {"similarity": similarity, "versions": versions}
        write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        return index

    # The model

    @property
    def encoder(self) -> SentenceEmbeddingPipeline:
        """The pipeline that makes the vectors; it is loaded when it is first used."""
        if self._pipeline is None:
            name, dtype = self.model_name, self.options.dtype
            loaded: Any = pipeline("sentence-embedding", name, device=self.device, dtype=dtype)
            self.check_model()
            self._pipeline = loaded
        assert self._pipeline is not None
        return self._pipeline

    def check_model(self) -> None:
        """Raise `InputError` if weights, tokenizer or settings are not those that the index was made with."""
        expected = self.manifest["fingerprint"]
        if expected is not None and _fingerprint(self.model_name) != expected:
            named, own = (name or "the package's own" for name in (self.model_name, self.manifest["model"]))
            raise InputError(
                f"model is {named}, and {self.folder} was made with {own}, of other weights, another tokenizer or "
                "other settings; give the model that it was made with, or make another index"
            )

    @property
    def dimensions(self) -> int:
        """Dimensions of a vector."""
        return self.encoder.embedding.truncate_dim or self.encoder.dimensions

    @property
    def store(self) -> Store:
        """The tables."""
        if self._store is None:
            self._store = Store(
                self.folder, self.manifest["dimensions"], self.manifest["similarity"], self.options.language
            )
        return self._store

    def prompt(self, name: str) -> dict[str, Any]:
        """The option that puts the checkpoint's prompt for a query or a document before a text, if it has that one."""
        return {"prompt_name": name} if name in self.encoder.embedding.prompts else {}

    # Indexing

    def update(self, places: str | Path | Sequence[str | Path], progress: bool = False) -> IndexReport:
        """Bring the index up to date with these folders and files; see `build_index`, which also locks it."""
        roots = _roots(places)
        known = self.store.files()
        files = _files(self.folder, roots, known)
        gone = [p for p in known if p not in files and any(Path(p).is_relative_to(r.resolve()) for r in roots)]
        report = IndexReport(removed=len(gone))
        self.store.remove(gone)
        pending: list[Pending] = []
        done: dict[str, tuple[str, set[int]]] = {}  # files read to their end -> digest, and rows that are no more
        begun = self.store.begun() - set(gone)
        for path in _watched(sorted(files), progress):
            try:
                digest = digest_of_file(files[path])
                if known.get(path) == digest:
                    report.unchanged += 1
                    continue
                had = self.store.rows(path) if path in begun else {}
                rows = set()
                for document in read_documents(files[path], self.options.columns):
                    rows.add(document.row)
                    if had.get(document.row) != document.digest:
                        self.store.check_columns(path, document)
                        pending.append(self._cut(path, document, document.row in had))
                    if sum(len(one.passages) for one in pending) >= _TOGETHER:
                        report.embedded += self._keep(pending, done)
            except (InputError, OSError) as error:
                report.failed[path] = str(error)
                pending = [one for one in pending if one.path != path]
                continue
            done[path] = digest, set(had) - rows
            report.changed += path in known
            report.added += path not in known
        report.embedded += self._keep(pending, done)
        if report.removed or report.added or report.changed:
            self.store.tidy()
        report.passages = self.store.count()
        return report

    def _cut(self, path: str, document: Document, is_known: bool) -> Pending:
        """A document with its passages, and what the model reads of them."""
        encoder, options, text = self.encoder, self.options, document.text
        (encoding,) = encoder.tokenizer([text], add_special_tokens=False, truncation=False).encodings or ()
        tokens = Tokens(encoding.offsets)
        prompt = encoder.prompt(self.prompt("document").get("prompt_name"))
        room = min(options.window_tokens or encoder.context, encoder.context) - _SLACK
        room -= len(encoder.tokenizer(prompt).input_ids)
        if room < 1:
            raise InputError(f"window_tokens is {options.window_tokens}; {1 - room} more make room for text")
        passages = passages_of(text, tokens, min(options.passage_tokens, room), options.language)
        is_late = options.late_chunking
        if is_late is None:
            is_late = not {"cls", "last"} & set(encoder.embedding.poolings)
        if not is_late:
            return Pending(path, document, is_known, passages, [text[a:b] for a, b in passages])
        items = [
            {"text": text[start:end], "spans": [(a - start, b - start) for a, b in passages[new:last]]}
            for start, end, new, last in windows_of(passages, tokens, room, min(options.overlap_tokens, room // 4))
        ]
        return Pending(path, document, is_known, passages, items)

    def _keep(self, pending: list[Pending], done: dict[str, tuple[str, set[int]]]) -> int:
        """Embed documents and store them, then note the files that are done; how many passages were embedded."""
        prompt = self.prompt("document")
        answers = self.encoder.stream([item for one in pending for item in one.items], on_error="return", **prompt)
        passages: list[Passage] = []
        for one in pending:
            spans = iter(one.passages)
            vectors: list[Any] = []
            for answer, item in zip(itertools.islice(answers, len(one.items)), one.items, strict=True):
                its = [next(spans) for _ in item["spans"]] if isinstance(item, dict) else [next(spans)]
                if isinstance(answer, InputError):  # a part of a text can have more tokens than it has in the whole
                    texts = [one.document.text[a:b] for a, b in its]
                    answer = self.encoder(texts, truncation=True, **prompt)
                vectors.extend(answer if isinstance(item, dict) or len(answer.shape) > 1 else [answer])
            placed = enumerate(zip(one.passages, vectors, strict=True))
            passages += [Passage(one.path, one.document, i, *span, vector) for i, (span, vector) in placed]
        self.store.put(passages, [(one.path, one.document.row) for one in pending if one.is_known])
        self.store.finish(done)
        pending.clear()
        done.clear()
        return len(passages)

    # Searching

    def search(self, question: str, **options: Any) -> list[Result]:
        """The passages that answer a question best, the best first.

        Vectors are compared with all passages, exactly. What they propose and what the words propose (BM25) is fused; a
        reranker, if the index was opened with one, then orders the best of these.

        Args:
            question: any text.
            options: those of `SearchOptions`.

        Raises:
            InputError: an option is not allowed, or the condition of `where` is not understood.
        """
        check_text(question, "a question")
        chosen = SearchOptions.of(options, "a search")
        vector = None if chosen.by == "words" else self.encoder(question, **self.prompt("query"))
        found = self.proposed(question, vector, chosen)
        if self.reranker is None or not found:
            return marked(found[: chosen.top_k], question)
        best = found[: chosen.reranked]
        answers = self.reranker(query=question, documents=[one.text for one in best], truncation=True)
        return marked(reranked(best, answers)[: chosen.top_k], question)

    def proposed(self, question: str, vector: Any, options: SearchOptions) -> list[Result]:
        """What vectors and words propose, fused, the best first; no words are marked. No model is used.

        Args:
            question: any text.
            vector: of the question; it is not used where words alone are wanted.
            options: of the search.

        Raises:
            InputError: the condition of `where` is not understood.
        """
        count, where = max(options.candidates, options.top_k, options.reranked), options.where
        weight = options.vector_weight
        if weight is None:
            weight = _SMALL_WEIGHT if self.manifest["model"] is None else 1.0
        lists: list[tuple[float, list[dict[str, Any]]]] = []
        if options.by != "words":
            lists.append((weight, self.store.nearest(vector, count, where)))
        if options.by != "vectors":
            lists.append((options.word_weight, self.store.with_words(question, count, where)))
        rows = {row["id"]: row for _, found in lists for row in found}
        scores = dict.fromkeys(rows, 0.0)
        for number, (weight, found) in enumerate(lists):
            lowest = (
                0.0 if number and len(found) < count else None
            )  # passages without the words have 0, none is missing
            for key, score in _parts(found, weight, options, lowest, is_fused=len(lists) > 1):
                scores[key] += score
        return [_result(rows[key], scores[key]) for key in sorted(rows, key=lambda key: (-scores[key], key))]


def _parts(
    found: Sequence[dict[str, Any]], weight: float, options: SearchOptions, lowest: float | None, is_fused: bool
) -> Iterator[tuple[str, float]]:
    """What a list adds to the score of each of its passages; the lowest score that there is, if it is not the last."""
    last, highest = (found[-1]["score"], found[0]["score"]) if found else (0.0, 0.0)
    lowest = last if lowest is None else lowest
    for rank, row in enumerate(found, 1):
        if not is_fused:
            yield row["id"], row["score"]
        elif options.fusion == "ranks":
            yield row["id"], weight / (options.fusion_constant + rank)
        else:
            yield row["id"], weight * (row["score"] - lowest) / (highest - lowest) if highest > lowest else weight


def _result(row: dict[str, Any], score: float) -> Result:
    own = {name: row[name] for name in ("text", "path", "start", "end", "page")}
    columns = {n: v for n, v in row.items() if n not in Store.OWN and n != "score" and v is not None}
    columns = {n: int(v) if isinstance(v, float) and v.is_integer() else v for n, v in columns.items()}
    return Result(**own, row=row["row"] or None, score=float(score), columns=columns, marks=[])


def reranked(results: Sequence[Result], answers: Iterable[dict[str, Any]]) -> list[Result]:
    """The results in the order, and with the scores, that a pipeline of text-ranking gives their texts."""
    return [dataclasses.replace(results[answer["index"]], score=float(answer["score"])) for answer in answers]


def marked(results: Iterable[Result], question: str) -> list[Result]:
    """The results with marks where words of the question are."""
    words = _words(question)
    return [dataclasses.replace(result, marks=marks_of(result.text, words)) for result in results]


# Words of a question that are not marked, each between spaces.
_SMALL_WORDS = (
    " a an and are as at be by can could did do does for from had has have how i in is it its not of on or our should "
    "so that the their them then there these they this those to was we were what when where which who whom whose why "
    "will with would you your "
)
_WORD = re.compile(r"[^\W_]+")


def _words(question: str) -> list[str]:
    words = [word.casefold() for word in _WORD.findall(question)]
    return [word for word in dict.fromkeys(words) if f" {word} " not in _SMALL_WORDS]


def marks_of(text: str, words: Sequence[str]) -> list[Span]:
    """Words of a text that are among these, or differ from one of them by an ending of up to three letters."""
    return [found.span() for found in _WORD.finditer(text) if any(_alike(found[0].casefold(), word) for word in words)]


def _alike(one: str, other: str) -> bool:
    if one == other or (not other.isascii() and other in one):  # words of some languages have no space between
        return True
    alike = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    shorter, longer = sorted((len(one), len(other)))
    return longer - alike <= 3 and shorter - alike <= (alike > 4) and alike >= 4


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged: {printable(str(error), limit=200)}") from None
    wanted = {"format", "model", "fingerprint", "options", "dimensions", "similarity"}
    if not isinstance(manifest, dict) or not wanted <= set(manifest) or manifest["format"] != _FORMAT:
        raise InputError(f"{path} is of no index of format {_FORMAT}; make the index again")
    return manifest


def _fingerprint(model: str | None) -> str:
    """A hash of everything that decides a model's vectors: weights, tokenizer, settings."""
    return fingerprint(Source(small_model_of("sentence-embedding") if model is None else model))


def _roots(places: str | Path | Sequence[str | Path]) -> list[Path]:
    roots = [Path(places)] if isinstance(places, str | Path) else [Path(place) for place in places]
    if not roots:
        raise InputError("places is empty; give folders or files")
    return roots


def _files(index: Path, roots: list[Path], known: Iterable[str]) -> dict[str, Path]:
    """The files below places, by their full names; raises `InputError` for a place that is not there or never was."""
    files: dict[str, Path] = {}
    for root in roots:
        if root.is_dir():
            for folder, folders, names in os.walk(root.resolve()):
                folders[:] = [n for n in folders if n[0] != "." and Path(folder, n) != index.resolve()]
                paths = (Path(folder, name) for name in names if name[0] != ".")
                files |= {str(path): path for path in paths if path.suffix.lower() in SUFFIXES}
        elif root.is_file():
            if root.suffix.lower() not in SUFFIXES:
                raise InputError(f"{root} ends with {root.suffix or 'nothing'}; read are {', '.join(SUFFIXES)}")
            files[str(root.resolve())] = root.resolve()
        elif not any(Path(path).is_relative_to(root.resolve()) for path in known):
            raise InputError(f"there is no file or folder {root}")
    return files


def _watched(paths: list[str], progress: bool) -> Iterable[str]:
    from modernbert.pipelines.progress import progress_bar

    return progress_bar(paths, len(paths), "files") if progress else paths
