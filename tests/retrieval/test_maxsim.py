"""MaxSim: the sums of the definition, whatever is compared together, without products that are held."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from modernbert import maxsim
from modernbert.errors import InputError


def vectors(lengths, dimensions=48, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(sum(lengths), dimensions, generator=generator)
    return list(torch.nn.functional.normalize(found, dim=-1).to(dtype).split(lengths))


def by_definition(queries, documents):
    return np.array([[float((q.double() @ d.double().T).max(1).values.sum()) for d in documents] for q in queries])


@pytest.mark.parametrize("kernels", ["kernels", "without"])
@pytest.mark.parametrize("dimensions", [48, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_the_sum_of_the_largest_products(dtype, dimensions, kernels, monkeypatch):
    if kernels == "without":
        monkeypatch.setattr("modernbert.engines.cpu.library.library", lambda: None)
    queries = vectors([32, 1, 7], dimensions, dtype)
    documents = vectors([1, 300, 12, 13, 700, 5], dimensions, dtype, seed=1)
    found = maxsim(queries, documents)
    tolerance = 1e-5 if dtype == torch.float32 or kernels == "kernels" else 0.1  # products rounded to bfloat16
    np.testing.assert_allclose(found, by_definition(queries, documents), atol=tolerance)
    for q, row in zip(queries, found, strict=True):
        assert (maxsim(q, documents) == row).all()
        assert [maxsim(q, document) for document in documents] == row.tolist()
    packed = torch.cat(documents)
    assert (maxsim(queries, packed, lengths=[len(x) for x in documents]) == found).all()
    assert (maxsim(queries, documents[1]) == found[:, 1]).all()


def test_takes_arrays_and_mixed_dtypes():
    query, document = vectors([5, 9])
    assert maxsim(query.numpy(), document.numpy()) == maxsim(query, document)
    assert maxsim([query], [document.bfloat16()])[0, 0] == pytest.approx(maxsim(query, document), abs=0.05)
    assert maxsim([query, query], []).shape == (2, 0)


@pytest.mark.parametrize("kernels", ["kernels", "without"])
@pytest.mark.parametrize("number", [1, 17])
def test_a_vector_with_nan_makes_its_own_similarities_nan(number, kernels, monkeypatch):
    if kernels == "without":
        monkeypatch.setattr("modernbert.engines.cpu.library.library", lambda: None)
    queries, documents = vectors([3, number]), vectors([5, number, 9], seed=1)
    whole = maxsim(queries, documents)
    documents[1][number // 2, 3] = math.nan
    found = maxsim(queries, documents)
    assert np.isnan(found[:, 1]).all()
    assert (found[:, [0, 2]] == whole[:, [0, 2]]).all()
    queries[1][0, 0] = math.nan
    found = maxsim(queries, documents)
    assert np.isnan(found).tolist() == [[False, True, False], [True] * 3]


def test_arrays_are_read_however_they_lie_in_memory():
    query, document = (x.numpy() for x in vectors([5, 9]))
    expected = maxsim(query, document)
    fixed = document.copy()
    fixed.flags.writeable = False
    for one in (document[::-1], np.asfortranarray(document), document.astype(">f4"), fixed):
        assert maxsim(query, one) == expected


def test_refuses_what_cannot_be_compared():
    query, document = vectors([5, 9])
    for given, expected in (
        ((query, document[0]), r"documents holds a Tensor of shape \(48,\); give floats"),
        ((query, [document, document[:0]]), r"documents\[1\] has no vectors"),
        ((query, document[:, :12]), "12 dimensions on cpu and 48 dimensions on cpu"),
        ((query, "text"), "documents holds a str; give floats"),
        ((query, document, [4, 4]), "lengths add up to 8; documents has 9 vectors"),
        ((query, document, [12, -3]), "lengths add up to 9 and hold -3; documents has 9 vectors"),
        ((query, document, [4.0, 5.0]), r"lengths is \[4.0, 5.0\]; give the number of vectors"),
        ((query, document, 9), "lengths is 9; give the number of vectors"),
        ((query, document.to_sparse()), "documents holds a Tensor of shape"),
        ((query, document.numpy()[None]), r"documents holds a ndarray of shape \(1, 9, 48\)"),
    ):
        with pytest.raises(InputError, match=expected):
            maxsim(*given)


def test_memory_grows_with_the_documents_and_not_with_the_products():
    code = """
import resource, torch
from modernbert import maxsim
torch.set_num_threads(1)
queries = list(torch.randn(64 * 32, 64).split(32))
documents = torch.randn(40_000, 64)
maxsim(queries[:1], documents[:100], lengths=[100])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
maxsim(queries, documents, lengths=[100] * 400)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert grown < 60_000, "KiB; all products would take 328 MB"
