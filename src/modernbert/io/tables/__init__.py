"""Rows of files, read, matched with the fields of a task, and written as they stream by.

.txt, .csv, .tsv, .jsonl and .parquet are read and written; .json, CoNLL, SQuAD's form and folders of the `datasets`
library are read. A row is a dict of columns; a line of plain text is {"text": line}.
"""

from modernbert.io.tables.columns import Field, choose_columns, parse_columns, text_in, value_in
from modernbert.io.tables.reading import (
    Record,
    check_file,
    count_records,
    parts_of,
    place_of,
    read_in_place,
    read_records,
)
from modernbert.io.tables.writing import ResumableOutput, check_output

__all__ = [
    "Field",
    "Record",
    "ResumableOutput",
    "check_file",
    "check_output",
    "choose_columns",
    "count_records",
    "parse_columns",
    "parts_of",
    "place_of",
    "read_in_place",
    "read_records",
    "text_in",
    "value_in",
]
