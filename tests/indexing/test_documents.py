"""Every kind of file as documents, and what is no such file as one error."""

import datetime

import pytest

from modernbert.errors import InputError
from modernbert.indexing.documents import read_documents


def pdf_of(*pages):
    """The bytes of a PDF with a line of text on each page."""
    kids = " ".join(f"{3 + 2 * i} 0 R" for i in range(len(pages)))
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>"]
    font = "<< /Font << /F << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >>"
    for i, text in enumerate(pages):
        page = f"/Parent 2 0 R /MediaBox [0 0 612 792] /Contents {4 + 2 * i} 0 R /Resources {font}"
        shown = f"BT /F 12 Tf 72 720 Td ({text}) Tj ET"
        objects += [f"<< /Type /Page {page} >>", f"<< /Length {len(shown)} >>\nstream\n{shown}\nendstream"]
    out, places = "%PDF-1.4\n", []
    for i, content in enumerate(objects, 1):
        places.append(len(out))
        out += f"{i} 0 obj\n{content}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    return f"{out}trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{out.index('xref')}\n%%EOF\n".encode()


def read(tmp_path, name, content, columns=()):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_documents(path, list(columns)))


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>One <b>bo</b>ld\n word.</p><p>Two&nbsp;&amp; three", "One bold word.\nTwo & three"),
        ("<head><title>No</title><style>p {}</style></head><body>Yes<script>no()</script>!<br>2", "Yes!\n2"),
        ("<ul><li>a<li>b</ul><table><tr><td>c</td><td>d</td></tr></table>", "a\nb\nc\nd"),
        ("<head><body>Never closed", "Never closed"),
        (b"<meta charset='latin-1'><p>caf\xe9", "café"),
        (b"\xef\xbb\xbf<p>caf\xc3\xa9 < 5 <", "café < 5 <"),
        ("<script>unclosed", None),
    ],
)
def test_a_page_is_what_a_browser_shows_of_it(tmp_path, page, text):
    assert [document.text for document in read(tmp_path, "a.html", page)] == ([text] if text else [])


def test_pages_of_a_pdf(tmp_path):
    pytest.importorskip("pypdf", reason="the extra `search` is not installed")
    (document,) = read(tmp_path, "a.pdf", pdf_of("First page.", "The second one."))
    assert document.text == "First page.\nThe second one."
    assert document.pages == (0, 12)
    for broken in (b"%PDF-1.4 and no more", pdf_of(" ")):
        with pytest.raises(InputError, match=r"a\.pdf"):
            read(tmp_path, "a.pdf", broken)


def test_a_row_is_a_document_and_its_other_columns_have_one_kind_each(tmp_path):
    table = "body,year,code,mixed,empty\nOne.,2020,007,1,\n,2021,1,1,\nThree.,2022.5,010,x,\n"
    documents = read(tmp_path, "a.csv", table)
    assert [(d.text, d.row) for d in documents] == [("One.", 1), ("Three.", 3)]
    assert documents[0].columns == {"year": 2020.0, "code": "007", "mixed": "1"}
    assert documents[1].columns == {"year": 2022.5, "code": "010", "mixed": "x"}
    lines = '{"title": "a", "t": "One.", "n": 1, "ok": true, "big": 9007199254740993, "list": [1], "none": null}\n'
    (document,) = read(tmp_path, "a.jsonl", lines, ["t"])
    assert document.text == "One."
    assert document.columns == {"title": "a", "n": 1.0, "ok": True, "big": "9007199254740993", "list": "[1]"}


def test_columns_of_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"text": ["One."], "day": [datetime.date(2026, 1, 2)], "x": [float("nan")], "y": [3]}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    (document,) = read_documents(tmp_path / "a.parquet", [])
    assert document.columns == {"day": "2026-01-02", "y": 3.0}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"\xff\xfe", "is no text in UTF-8"),
        ("a.md", b"a\0b", "holds NUL bytes"),
        ("a.html", b"<meta charset=nonsense>", "is no text in NONSENSE"),
        ("a.jsonl", '{"x": "a"}\n', "none is known to hold the text"),
        ("a.jsonl", '{"text": "a"}\n{"text": 5}\n', "row 2, has an int in 'text'"),
        ("a.csv", "text,a\nx,1,2\n", "line 2"),
    ],
)
def test_what_cannot_be_read_is_one_error_that_names_the_file(tmp_path, name, content, said):
    with pytest.raises(InputError, match=rf"a\.\w+.*{said}"):
        read(tmp_path, name, content)


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_a_file_without_text_has_no_documents(tmp_path, content):
    assert read(tmp_path, "a.md", content) == read(tmp_path, "a.html", content) == []
