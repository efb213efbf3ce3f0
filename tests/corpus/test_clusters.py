"""Tests that need Ray, Spark or Daft, in an environment of their own over the packages that are installed here.

They are too large for the packages of the other tests, which skip what needs them.
"""

import pytest

from tests.interop.environments import ROOT, pytest_over

PACKAGES = ("ray[data,serve]==2.60.0", "pyspark==4.3.0", "daft==0.6.14")
FILES = ("corpus/test_ray.py", "corpus/test_recipes.py", "serving/test_replicas.py", "serving/test_scaling.py")


@pytest.mark.slow
def test_all_that_needs_a_cluster(tmp_path):
    packages = ("-c", ROOT / "constraints.txt", *PACKAGES)
    shown = pytest_over("clusters", packages, ["--all", *(f"tests/{file}" for file in FILES)], tmp_path)
    assert "needs ray" not in shown
