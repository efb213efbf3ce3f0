"""Corpora larger than a machine: any task over files of texts, resumable, with one result whatever ran it.

Names are imported when they are first used.
"""

from __future__ import annotations

from modernbert.lazy import exports

_EXPORTS = {
    "CorpusOptions": "corpus.options",
    "CorpusReport": "corpus.job",
    "Settings": "corpus.settings",
    "Transform": "corpus.transform",
    "CorpusError": "corpus.output",
    "VerifyReport": "corpus.verification",
    "answers": "corpus.results",
    "digest": "corpus.results",
    "digest_of": "corpus.results",
    "run": "corpus.job",
    "verify": "corpus.verification",
}
__getattr__, __dir__ = exports(__name__, _EXPORTS)
__all__ = __dir__()
