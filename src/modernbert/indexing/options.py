"""Options of an index and of a search. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import re

from modernbert.checks import Options, option
from modernbert.errors import InputError, shown

# Languages whose words are compared by their stems -> their names in LanceDB.
STEMMED = {
    "ar": "Arabic",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "fi": "Finnish",
    "fr": "French",
    "hu": "Hungarian",
    "it": "Italian",
    "nl": "Dutch",
    "no": "Norwegian",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sv": "Swedish",
    "ta": "Tamil",
    "tr": "Turkish",
}
UNSPACED = ("ja", "km", "ko", "lo", "my", "th", "zh")  # words have no spaces between, or grow by endings


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexOptions(Options):
    """What an index is made with, and keeps; a later run has to agree where it says anything."""

    passage_tokens: int = option(256, "Most tokens of a passage; passages end where sentences do.", least=8)
    window_tokens: int | None = option(
        None, "Tokens of a document that are read in one pass.", least=16, otherwise="the model's context"
    )
    overlap_tokens: int = option(
        128, "Tokens that a window of a long document reads again, at most a quarter of it.", least=0
    )
    late_chunking: bool | None = option(
        None,
        "Read each passage within its document instead of alone.",
        otherwise="yes if the model's vectors are means of its tokens",
    )
    language: str = option(
        "en",
        "Language of the documents, such as en, de or zh; it decides where sentences end and which words are alike.",
    )
    columns: list[str] = option([], "Column of tables that holds the text.", otherwise="text", flag="column")
    dtype: str | None = option(
        None, "Type of the weights: auto, float32, bfloat16 or float16.", otherwise="the checkpoint's"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch("[a-z]{2,3}", self.language):
            raise InputError(
                f"language is {shown(self.language)}; give a code of two or three letters, such as en or de"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchOptions(Options):
    """How passages are found and ordered."""

    top_k: int = option(10, "Number of passages to give, the best first.", least=1)
    where: str | None = option(
        None, "Condition on columns, in SQL, such as \"year > 2020 AND path LIKE '%.pdf'\".", otherwise="none"
    )
    by: str = option("both", "What is compared.", choices=("both", "vectors", "words"))
    candidates: int = option(100, "Passages that vectors, and words, propose before they are fused.", least=1)
    reranked: int = option(50, "Passages that a reranker reads, the best ones.", least=1)
    fusion: str = option(
        "scores",
        "How the lists of vectors and words are fused: by scores, those of a list scaled to 0 to 1, or by ranks "
        "(reciprocal rank fusion).",
        choices=("scores", "ranks"),
    )
    fusion_constant: float = option(
        60.0, "fusion by ranks: a passage scores weight / (constant + rank) in each list.", least=0
    )
    vector_weight: float | None = option(
        None,
        "Weight of the list that vectors give.",
        least=0,
        otherwise="1, or 0.5 where the package's sentence encoder makes the vectors",
    )
    word_weight: float = option(1.0, "Weight of the list that words give.", least=0)
