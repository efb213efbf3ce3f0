"""Records in files, one after another: .txt, .csv, .tsv, .jsonl and .parquet, read and written as they stream by;
.json, CoNLL, SQuAD and folders of the `datasets` library read.

A record is a dict of columns; a line of plain text is {"text": line}.
"""

from modernbert.io.tables.reading import Record, count_records, read_records
from modernbert.io.tables.structured import parts_of, place_of
from modernbert.io.tables.writing import ResumableOutput

__all__ = ["Record", "ResumableOutput", "count_records", "parts_of", "place_of", "read_records"]
