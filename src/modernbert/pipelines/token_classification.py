"""token-classification: labels of tokens, and the entities that they make."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from modernbert.auto import AutoModelForTokenClassification
from modernbert.checks import check_text, short
from modernbert.errors import InputError, shown
from modernbert.models.heads import ModernBertForTokenClassification
from modernbert.pipelines.base import Job, Pipeline, Results, Row, check_windows, read
from modernbert.pipelines.options import TokenClassificationOptions, TokenizeOptions

Scores = NDArray[np.float32]  # one a label
_STRIDE = 128  # tokens that windows of a long text share by default


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of a text.

    Attributes:
        index: its place among the text's tokens, special ones included.
        piece: how the vocabulary spells it.
        start, end: its characters in the text.
        continues: whether it continues the word of the token before.
    """

    index: int
    piece: str
    start: int
    end: int
    continues: bool


@dataclasses.dataclass
class Window(Row):
    """Tokens of a text with special ones around them, `before` of them at the beginning."""

    tokens: list[Token]
    before: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedOptions(TokenClassificationOptions):
    """Options with a stride that fits the model."""

    stride: int


class TokenClassificationPipeline(Pipeline[ResolvedOptions, Window, Scores]):
    """Labels of tokens, or entities.

    A call takes a text, a list of texts or an iterable of them. "B-" begins an entity, "I-" continues it.

    For each text it gives a list of {"entity", "score", "index", "word", "start", "end"}, or of {"entity_group",
    "score", "word", "start", "end"}; "start" and "end" are characters of the text. One list of words gives a list of
    one answer, as in transformers. Of entities that overlap between two windows the longer one stays, then the more
    probable one; of single tokens the one farther from its window's edge.
    """

    task = "token-classification"
    options = TokenClassificationOptions
    auto_model = AutoModelForTokenClassification
    models = (ModernBertForTokenClassification,)
    needs = "an encoder for token classification"

    def __call__(self, inputs: Any = None, *more: Any, **options: Any) -> Any:
        """A list of words is one input; see `Pipeline.__call__`."""
        own = {name: value for name, value in options.items() if name == "is_split_into_words"}
        words = inputs if isinstance(inputs, list | tuple) and self.given(own).is_split_into_words else ()
        if words and all(isinstance(word, str) for word in words):
            inputs = [inputs]
        return super().__call__(inputs, *more, **options)

    def resolve(self, options: TokenClassificationOptions) -> ResolvedOptions:
        """A stride that leaves room for new tokens in each window."""
        limit = self.context - self.tokenizer.num_special_tokens_to_add()
        stride = min(_STRIDE, max(limit // 4, 0)) if options.stride is None else options.stride
        if stride >= limit:
            raise InputError(f"stride is {stride}; windows hold {limit} tokens of text and must share fewer")
        return ResolvedOptions(**{**vars(options), "stride": stride})

    def prepare(self, items: list[Any], options: ResolvedOptions) -> list[list[Window]]:
        split, delimiter = options.is_split_into_words, options.delimiter
        texts = [delimiter.join(_words(item)) if split else item for item in items]
        for text in texts:
            check_text(text)
        how = TokenizeOptions(truncation=options.truncation, max_length=options.max_length)
        given = [list(item) for item in items] if split else items
        encodings = self.tokenizer(given, **self.cut(how), is_split_into_words=split).encodings
        assert encodings is not None
        rows = []
        for item, text, encoding in zip(items, texts, encodings, strict=True):
            starts = [0, *itertools.accumulate(len(word) + len(delimiter) for word in item)] if split else None
            tokens = self._tokens(text, starts, encoding)
            if not tokens:
                raise InputError(f"a text makes no token with this tokenizer: {short(text)!r}")
            rows.append(self._windows(encoding, tokens, options.stride))
        return rows

    def _windows(self, encoding: Encoding, tokens: list[Token], stride: int) -> list[Window]:
        """Rows of as many tokens of the text as the context holds, special ones around each."""
        first, last = tokens[0].index, tokens[-1].index + 1
        all_ids = encoding.ids
        before, after = all_ids[:first], all_ids[last:]
        limit = self.context - len(before) - len(after)
        check_windows(len(tokens), limit, limit - stride)
        rows = []
        for start in range(0, len(tokens), limit - stride):
            ids = all_ids[first + start : min(first + start + limit, last)]
            rows.append(Window([*before, *ids, *after], tokens[start : start + len(ids)], first))
            if start + limit >= len(tokens):
                break
        return rows

    def run(self, rows: list[Window], options: ResolvedOptions) -> Results[Scores]:
        """Probabilities (tokens, labels) of each row."""
        logits = self.model.run_packed(self.pack(rows)).logits.float()
        lengths = [len(row.ids) for row in rows]
        return read(logits.softmax(-1), lambda scores: [part.numpy() for part in scores.split(lengths)])

    def finish(self, job: Job[Window, Scores], options: ResolvedOptions) -> list[dict[str, Any]]:
        seen = [
            list(zip(row.tokens, scores[row.before : row.before + len(row.tokens)], strict=True))
            for row, scores in zip(job.rows, job.results, strict=True)
        ]
        if options.aggregation_strategy == "none":
            entities = [self._alone(token, scores) for token, scores in _merged_tokens(seen)]
            return [e for e in entities if e["entity"] not in options.ignore_labels]
        found = []
        for tokens in seen:
            labelled = self._labelled(tokens, options.aggregation_strategy)
            found += [e for e in self._entities(labelled) if e["entity_group"] not in options.ignore_labels]
        return found if len(seen) == 1 else _merged_entities(found)

    def _tokens(self, text: str, word_starts: list[int] | None, encoding: Encoding) -> list[Token]:
        tokens = []
        unknown = self.tokenizer.unk_token_id
        # The library makes each of these lists anew whenever it is asked.
        lists = encoding.ids, encoding.tokens, encoding.offsets, encoding.word_ids, encoding.special_tokens_mask
        for i, (token_id, piece, (start, end), word, special) in enumerate(zip(*lists, strict=True)):
            if special:
                continue
            if word_starts is not None and word is not None:
                start, end = start + word_starts[word], end + word_starts[word]
            # A token begins a word where a space stands at its first character or before it.
            continues = start > 0 and " " not in text[start - 1 : start + 1]
            if token_id == unknown:
                piece, continues = text[start:end], False
            tokens.append(Token(i, piece, start, end, continues))
        return tokens

    def _alone(self, token: Token, scores: Scores) -> dict[str, Any]:
        label = int(scores.argmax())
        return {
            "entity": self.model.config.id2label[label],
            "score": float(scores[label]),
            "index": token.index,
            "word": token.piece,
            "start": token.start,
            "end": token.end,
        }

    def _labelled(self, tokens: list[tuple[Token, Scores]], strategy: str) -> list[dict[str, Any]]:
        """Tokens or words with one label each: {"entity", "score", "word", "start", "end"}."""
        if strategy == "simple":
            return [self._alone(token, scores) for token, scores in tokens]
        words: list[list[tuple[Token, Scores]]] = []
        for token, scores in tokens:
            if words and token.continues:
                words[-1].append((token, scores))
            else:
                words.append([(token, scores)])
        out = []
        for word in words:
            if strategy == "first":
                scores = word[0][1]
            elif strategy == "max":
                scores = max((scores for _, scores in word), key=lambda scores: scores.max())
            else:
                scores = np.stack([scores for _, scores in word]).mean(0)
            piece = self.tokenizer.convert_tokens_to_string([token.piece for token, _ in word])
            (first, _), (last, _) = word[0], word[-1]
            out.append(self._alone(dataclasses.replace(first, piece=piece, end=last.end), scores))
        return out

    def _entities(self, labelled: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Runs of one label, put together."""
        groups: list[list[dict[str, Any]]] = []
        before = None
        for token in labelled:
            begins, kind = _parts(token["entity"])
            if groups and kind == before and not begins:
                groups[-1].append(token)
            else:
                groups.append([token])
            before = kind
        return [
            {
                "entity_group": group[0]["entity"].split("-", 1)[-1],
                "score": float(np.mean([token["score"] for token in group])),
                "word": self.tokenizer.convert_tokens_to_string([token["word"] for token in group]),
                "start": group[0]["start"],
                "end": group[-1]["end"],
            }
            for group in groups
        ]


def _words(item: Any) -> list[str]:
    if not isinstance(item, list | tuple) or not item:
        raise InputError(f"an input is {shown(item)}; with is_split_into_words it is a list of words, not empty")
    return [check_text(word, "a word") for word in item]


def _parts(label: str) -> tuple[bool, str]:
    """Whether a label begins an entity, and its kind without "B-" or "I-"."""
    return label.startswith("B-"), label[2:] if label[:2] in ("B-", "I-") else label


def _merged_entities(entities: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entities of several windows: of those that overlap, the longest stays, then the most probable."""
    out: list[dict[str, Any]] = []
    for entity in sorted(entities, key=lambda e: e["start"]):
        if not out or entity["start"] >= out[-1]["end"]:
            out.append(entity)
            continue
        longer = (entity["end"] - entity["start"]) - (out[-1]["end"] - out[-1]["start"])
        if longer > 0 or (longer == 0 and entity["score"] > out[-1]["score"]):
            out[-1] = entity
    return out


def _merged_tokens(windows: list[list[tuple[Token, Scores]]]) -> list[tuple[Token, Scores]]:
    """Tokens of several windows in their order, each from the window where it is farthest from an edge."""
    best: dict[int, tuple[int, tuple[Token, Scores]]] = {}
    for tokens in windows:
        for i, (token, scores) in enumerate(tokens):
            room = min(i, len(tokens) - 1 - i)
            if token.index not in best or room > best[token.index][0]:
                best[token.index] = (room, (token, scores))
    return [best[index][1] for index in sorted(best)]
