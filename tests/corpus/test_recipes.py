"""The callable in other engines: Ray Data, Spark and Daft give the notebook's bits, as docs/scale.md shows them."""

import os
import re
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modernbert import corpus
from modernbert.corpus import Settings, Transform
from tests.clusters import ray_here
from tests.corpus.conftest import TEXTS

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.filterwarnings("ignore")]  # theirs, not ours to mend
PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


@pytest.fixture
def recipe(model, tmp_path, monkeypatch):
    """Run the page's code for a library over files of texts; the answers that it wrote."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    (tmp_path / "texts").mkdir()
    for i in range(0, len(TEXTS), 40):
        pq.write_table(pa.table({"id": range(i, i + 40), "text": TEXTS[i : i + 40]}), tmp_path / f"texts/{i}.parquet")

    def run(library):
        text = PAGE.read_text(encoding="utf-8")
        (code,) = re.findall(rf"### {library}\n.*?```python\n(.*?)```", text, re.DOTALL)
        exec(compile(code.replace("Alibaba-NLP/gte-modernbert-base", str(model)), library, "exec"), {})
        table = pq.read_table(tmp_path / "answers")
        assert sorted(table["id"].to_pylist()) == list(range(len(TEXTS)))
        schema = Transform(Settings("sentence-embedding", str(model))).schema
        return table.select(schema.names).cast(schema)

    return run


def test_ray_data(recipe, notebook):
    pytest.importorskip("ray.data", reason="needs ray: pip install 'ray[data]'")
    with ray_here():
        assert corpus.digest_of([recipe("Ray Data")]) == notebook


def test_spark(recipe, notebook):
    sql = pytest.importorskip("pyspark.sql", reason="needs Spark: pip install pyspark")
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("Spark needs Java")
    settings = {"spark.ui.enabled": "false", "spark.driver.memory": "512m", "spark.driver.bindAddress": "127.0.0.1"}
    session = sql.SparkSession.builder.master("local[2]").config(map=settings).getOrCreate()
    try:
        assert corpus.digest_of([recipe("Spark")]) == notebook
    finally:
        session.stop()


def test_daft(recipe, notebook):
    pytest.importorskip("daft", reason="needs Daft: pip install daft")
    assert corpus.digest_of([recipe("Daft")]) == notebook
