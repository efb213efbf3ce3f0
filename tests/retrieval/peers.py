"""Folders of late interaction that other libraries make and read, in environments of their own.

The libraries do not live in one process, so what they give goes through files.
"""

import json
from pathlib import Path

import numpy as np

# What each folder of PyLate says, besides a projection.
KINDS = {
    "as it comes": {},
    "short queries": {"query_length": 16},
    "prefixes": {"query_prefix": "query: ", "document_prefix": "passage: ", "query_length": 48, "document_length": 64},
    "no prefixes": {"query_prefix": "", "document_prefix": "", "query_length": 16, "document_length": 300},
    "attended": {"attend_to_expansion_tokens": True, "query_length": 24, "document_length": 48},
    "far beyond": {"query_length": 100},
    "not expanded": {"do_query_expansion": False, "query_length": 12},
    "some words skipped": {"skiplist_words": ["Ġthe", "the", ",", "Ġof", "no such token"]},
    "nothing skipped": {"skiplist_words": []},
    "a bias": {"embedding_size": 32, "bias": True},
    "two projections": {},
    "prompts": {"prompts": {"query": "search: ", "document": "text: "}},
    "saved after use": {"document_length": 200},
}


def made_by_pylate(body, folder, kinds=None):
    """A folder of each kind, by PyLate; the weights of projections are random."""
    import torch
    from pylate import models
    from sentence_transformers.models import Transformer

    for number, kind in enumerate(kinds or KINDS):
        torch.manual_seed(number)
        given = dict(KINDS[kind])
        if kind == "two projections":
            inner = Transformer(body)
            width = inner.get_word_embedding_dimension()
            projections = [models.Dense(width, 2 * width, bias=False, use_residual=True)]
            projections += [models.Dense(2 * width, 48, bias=True, activation_function=torch.nn.Tanh())]
            model = models.ColBERT(modules=[inner, *projections], device="cpu", **given)
        else:
            model = models.ColBERT(body, device="cpu", **given)
        if kind == "saved after use":
            model.encode("which it keeps as the longest text", is_query=True)
        model.save_pretrained(f"{folder}/{kind}", create_model_card=False)


def by_pylate(folder, texts):
    """What PyLate gives for a folder: vectors of queries and documents, their scores, and the order of documents."""
    import torch
    from pylate import models, rank, scores

    model = models.ColBERT(str(folder), device="cpu")
    queries = model.encode(texts["queries"], is_query=True, prompt=model.prompts.get("query"))
    documents = model.encode(texts["documents"], is_query=False, prompt=model.prompts.get("document"))
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(x) for x in documents], batch_first=True)
    found = torch.cat([scores.colbert_scores(torch.from_numpy(query)[None], padded) for query in queries])
    ids = list(range(len(documents)))
    ranked = rank.rerank([ids] * len(queries), queries, [documents] * len(queries))
    return queries, documents, found.numpy(), [[one["id"] for one in row] for row in ranked]


def by_sentence_transformers(folder, texts):
    """The same of sentence-transformers."""
    from sentence_transformers import MultiVectorEncoder

    model = MultiVectorEncoder(str(folder), device="cpu")
    queries = model.encode_query(texts["queries"], convert_to_numpy=True)
    documents = model.encode_document(texts["documents"], convert_to_numpy=True)
    found = model.similarity(queries, documents).numpy()
    return queries, documents, found, (-found).argsort(1, kind="stable").tolist()


def by_stanford(folder, texts):
    """The same of Stanford's library; its kernel for packed documents is not built."""
    import torch
    from colbert.infra import ColBERTConfig
    from colbert.modeling.checkpoint import Checkpoint
    from colbert.modeling.colbert import ColBERT, colbert_score

    ColBERT.loaded_extensions = True
    model = Checkpoint(str(folder), colbert_config=ColBERTConfig(checkpoint=str(folder)), verbose=0)
    queries = model.queryFromText(texts["queries"])
    documents = [part[0] for text in texts["documents"] for part in [model.docFromText([text], keep_dims=False)]]
    padded = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True)
    real = torch.tensor([[i < len(x) for i in range(padded.shape[1])] for x in documents])[..., None]
    found = torch.stack([colbert_score(query[None], padded, real) for query in queries])
    order = found.argsort(dim=1, descending=True, stable=True).tolist()
    return [x.numpy() for x in queries], [x.numpy() for x in documents], found.numpy(), order


def written(found, path):
    """What one of these gave, as a file."""
    queries, documents, scores, order = found
    arrays = {f"query {i}": x for i, x in enumerate(queries)} | {f"document {i}": x for i, x in enumerate(documents)}
    np.savez(path, scores=scores, order=np.array(order), **arrays)


def read(path):
    """That again."""
    with np.load(path) as arrays:
        names = [[name for name in arrays if name.startswith(side)] for side in ("query", "document")]
        queries, documents = ([arrays[name] for name in some] for some in names)
        return queries, documents, arrays["scores"], arrays["order"].tolist()


def saved_again(parent, output):
    """PyLate reads each folder in a folder and writes it."""
    from pylate import models

    for folder in sorted(Path(parent).iterdir()):
        models.ColBERT(str(folder), device="cpu").save_pretrained(f"{output}/{folder.name}", create_model_card=False)


def answers(by, parent, texts, output):
    """What a library gives for each folder in a folder, or the first line of its error."""
    texts, refused = json.loads(Path(texts).read_text()), {}
    Path(output).mkdir(parents=True, exist_ok=True)
    for folder in sorted(Path(parent).iterdir()):
        try:
            written(by(folder, texts), f"{output}/{folder.name}.npz")
        except Exception as error:
            refused[folder.name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    (Path(output) / "refused.json").write_text(json.dumps(refused))
