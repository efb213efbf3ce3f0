"""token-classification: labels of tokens, and the entities that they make."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from modernbert.auto import AutoModelForTokenClassification
from modernbert.errors import InputError, shown
from modernbert.models.heads import ModernBertForTokenClassification
from modernbert.pipelines.base import Job, Pipeline, Results, Row, read
from modernbert.pipelines.checks import check_choice, check_count, check_switch, check_text, short

STRATEGIES = ("none", "simple", "first", "average", "max")
Scores = NDArray[np.float32]  # one a label
_STRIDE = 128  # tokens that windows of a long text share, where nobody says


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of a text.

    Attributes:
        index: its place among the text's tokens, special ones included.
        piece: how the vocabulary spells it.
        start, end: its characters in the text.
        continues: whether it goes on with the word of the token before.
    """

    index: int
    piece: str
    start: int
    end: int
    continues: bool


class TokenClassificationPipeline(Pipeline):
    """Labels of tokens, or entities.

    A call takes a text, a list of texts or an iterable of them, and the options `aggregation_strategy`:

    - "none" (the default): each token by itself;
    - "simple": neighbours with one label make an entity;
    - "first", "average", "max": a word first gets one label, of its first token, of its tokens' mean, or of the token
      that is surest; then as "simple". "B-" begins an entity, "I-" goes on.

    Other options: `ignore_labels` (["O"]), `is_split_into_words` (a text is a list of words; offsets are those of the
    words joined by `delimiter`, a space), `stride` (tokens that windows share, where a text is longer than the
    context; 128).

    For each text it gives a list of {"entity", "score", "index", "word", "start", "end"}, or of {"entity_group",
    "score", "word", "start", "end"}; "start" and "end" are characters of the text. One list of words gives a list of
    one answer, as in transformers. Of entities that overlap between two
    windows the longer one stays, then the surer one; of single tokens the one farther from its window's edge.
    """

    task = "token-classification"
    auto_model = AutoModelForTokenClassification
    options = ("aggregation_strategy", "ignore_labels", "is_split_into_words", "delimiter", "stride")

    def __init__(self, model: Any, tokenizer: Any, **options: Any) -> None:
        if not isinstance(model, ModernBertForTokenClassification):
            raise InputError(f"{self.task} needs a token classification model; this is a {type(model).__name__}")
        super().__init__(model, tokenizer, **options)

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """Answer inputs; see the class and `Pipeline.__call__`."""
        split = check_switch("is_split_into_words", {**self.defaults, **options}.get("is_split_into_words"))
        if split and isinstance(inputs, list | tuple) and inputs and all(isinstance(word, str) for word in inputs):
            inputs = [inputs]
        return super().__call__(inputs, **options)

    def settle(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Defaults, checked."""
        strategy = settings.get("aggregation_strategy")
        strategy = "none" if strategy is None else strategy.lower() if isinstance(strategy, str) else strategy
        limit = self.context - self.tokenizer.num_special_tokens_to_add()
        stride = settings.get("stride")
        if stride is None:
            stride = min(_STRIDE, max(limit // 4, 0))
        if check_count("stride", stride, 0) >= limit:
            raise InputError(f"stride is {stride}; windows hold {limit} tokens of text and must share fewer")
        ignore = settings.get("ignore_labels")
        ignore = ["O"] if ignore is None else [ignore] if isinstance(ignore, str) else ignore
        if not isinstance(ignore, list | tuple | set) or not all(isinstance(label, str) for label in ignore):
            raise InputError(f"ignore_labels is {shown(ignore)}; give a list of labels")
        delimiter = settings.get("delimiter")
        if delimiter is not None and not isinstance(delimiter, str):
            raise InputError(f"delimiter is {shown(delimiter)}; it must be a string")
        return {
            "strategy": check_choice("aggregation_strategy", strategy, STRATEGIES),
            "ignore": set(ignore),
            "words": check_switch("is_split_into_words", settings.get("is_split_into_words")),
            "delimiter": " " if delimiter is None else delimiter,
            "stride": stride,
        }

    def prepare(self, items: list[Any], settings: dict[str, Any]) -> list[Job]:
        """One row a window."""
        if settings["words"]:
            for words in items:
                if not isinstance(words, list | tuple) or not words:
                    raise InputError(
                        f"an input is {shown(words)}; with is_split_into_words it is a list of words, not empty"
                    )
                check_text(settings["delimiter"].join(check_text(word, "a word") for word in words))
        else:
            for item in items:
                check_text(item)
        texts = [list(item) for item in items] if settings["words"] else items
        encodings = self.tokenizer(texts, truncation=False, is_split_into_words=settings["words"]).encodings
        assert encodings is not None
        jobs = []
        for item, encoding in zip(items, encodings, strict=True):
            text, starts = item, None
            if settings["words"]:
                text = settings["delimiter"].join(item)
                lengths = [len(word) + len(settings["delimiter"]) for word in item]
                starts = [0, *itertools.accumulate(lengths)]
            tokens = self._tokens(text, starts, encoding)
            if not tokens:
                raise InputError(f"a text makes no token with this tokenizer: {short(text)!r}")
            jobs.append(Job(self._windows(encoding, tokens, settings["stride"]), tokens))
        return jobs

    def _windows(self, encoding: Encoding, tokens: list[Token], stride: int) -> list[Row]:
        """Rows of as many tokens of the text as the context holds, special ones around each.

        A row's `extra` says which of the tokens it has.
        """
        first, last = tokens[0].index, tokens[-1].index + 1
        all_ids = encoding.ids
        before, after = all_ids[:first], all_ids[last:]
        limit = self.context - len(before) - len(after)
        rows = []
        for start in range(0, len(tokens), limit - stride):
            ids = all_ids[first + start : min(first + start + limit, last)]
            rows.append(Row([*before, *ids, *after], slice(start, start + len(ids))))
            if start + limit >= len(tokens):
                break
        return rows

    def run(self, rows: list[Row], settings: dict[str, Any]) -> Results:
        """Probabilities (tokens, labels) of each row."""
        ids_T, cu_seqlens = self.pack(rows)
        logits = self.model(ids_T, cu_seqlens=cu_seqlens).logits.float()
        return read(logits.softmax(-1), lambda scores: scores.split([len(row.ids) for row in rows]))

    def finish(self, job: Job, settings: dict[str, Any]) -> Any:
        """Tokens or entities."""
        seen = []
        for row, result in zip(job.rows, job.results, strict=True):
            before = job.context[0].index  # special tokens at the row's beginning
            some = job.context[row.extra]
            scores = result.numpy()[before : before + len(some)]
            seen.append(list(zip(some, scores, strict=True)))
        if settings["strategy"] == "none":
            entities = [self._alone(token, scores) for token, scores in _merged_tokens(seen)]
            return [e for e in entities if e["entity"] not in settings["ignore"]]
        found = []
        for tokens in seen:
            labelled = self._labelled(tokens, settings["strategy"])
            found += [e for e in self._entities(labelled) if e["entity_group"] not in settings["ignore"]]
        return found if len(seen) == 1 else _merged_entities(found)

    def _tokens(self, text: str, word_starts: list[int] | None, encoding: Encoding) -> list[Token]:
        tokens = []
        unknown = self.tokenizer.unk_token_id
        # The library makes each of these lists anew whenever it is asked.
        parts = zip(
            encoding.ids,
            encoding.tokens,
            encoding.offsets,
            encoding.word_ids,
            encoding.special_tokens_mask,
            strict=True,
        )
        for i, (token_id, piece, (start, end), word, special) in enumerate(parts):
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
            label = int(scores.argmax())
            out.append(
                {
                    "entity": self.model.config.id2label[label],
                    "score": float(scores[label]),
                    "word": self.tokenizer.convert_tokens_to_string([token.piece for token, _ in word]),
                    "start": word[0][0].start,
                    "end": word[-1][0].end,
                }
            )
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


def _parts(label: str) -> tuple[bool, str]:
    """Whether a label begins an entity, and its kind without "B-" or "I-"."""
    return label.startswith("B-"), label[2:] if label[:2] in ("B-", "I-") else label


def _merged_entities(entities: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entities of several windows: of those that overlap, the longest stays, then the surest."""
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
