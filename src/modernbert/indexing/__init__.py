"""A search engine in a folder: documents cut into passages, their vectors and their words, kept in LanceDB.

Names are imported when they are first used.
"""

from __future__ import annotations

from modernbert.lazy import exports

_EXPORTS = {
    "Index": "indexing.index",
    "IndexOptions": "indexing.options",
    "IndexReport": "indexing.index",
    "Result": "indexing.index",
    "SearchOptions": "indexing.options",
    "build_index": "indexing.index",
    "open_index": "indexing.index",
}
__getattr__, __dir__ = exports(__name__, _EXPORTS)
__all__ = __dir__()
