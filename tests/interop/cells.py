"""What is checked in each environment of the version table: patched objects of whichever versions are installed.

Each function returns a line: the versions, and the largest difference between unpatched and patched answers.
"""

import importlib.metadata
import tempfile
from pathlib import Path

import numpy as np
import torch

import modernbert
from modernbert.interop.patching import links_in
from modernbert.pipelines import small_model

SENTENCE = "the model reads packed texts and gives vectors for search in cities such as Paris or Rome while it rains"
WORDS = SENTENCE.split()
CONFIG = {
    "vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "local_attention": 16, "pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 2,
    "eos_token_id": 2,
}  # fmt: skip


def texts(count=24, longest=60):
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, int(n))) for n in generator.integers(1, longest, count)]


def batch(lengths=(50, 3, 20, 1, 33), choices=False):
    """A padded batch of ids and its mask."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 200, (len(lengths), max(lengths)), generator=generator)
    mask = torch.tensor([[i < n for i in range(max(lengths))] for n in lengths]).long()
    ids = ids * mask
    return {"input_ids": ids[None] if choices else ids, "attention_mask": mask[None] if choices else mask}


def folder():
    """The small model's encoder with the head of a masked language model, as transformers reads it."""
    path = Path(tempfile.mkdtemp())
    modernbert.AutoModelForMaskedLM.from_pretrained(small_model(), dtype="float32").save_pretrained(path)
    modernbert.AutoTokenizer.from_pretrained(small_model()).save_pretrained(path)
    return str(path)


def versions(*packages):
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)


def numbers(answer):
    if isinstance(answer, torch.Tensor):
        return [answer.to_dense().double().numpy()]
    parts = [part.double() if isinstance(part, torch.Tensor) else part for part in answer]
    return [np.asarray(part, dtype=np.float64) for part in parts]


def moved(thing, run, tolerance=1e-5, by_ours=True, look=None):
    """The largest difference that patching makes, relative where numbers are large; unpatched again the same bits.

    `by_ours` says that nothing may be computed by the other library's code; `look` gets the patched object.
    """
    before = numbers(run(thing))
    assert modernbert.patch(thing) is thing
    try:
        after = numbers(run(thing))
        assert not by_ours or all(link.frozen is not None for _, link in links_in(thing))
        if look is not None:
            look(thing)
    finally:
        modernbert.unpatch(thing)
    again = numbers(run(thing))
    assert len(before) == len(after)
    assert all(np.array_equal(a, b) for a, b in zip(before, again, strict=True))
    off = 0.0
    for a, b in zip(before, after, strict=True):
        assert a.shape == b.shape
        off = max(off, float((np.abs(a - b) / np.maximum(np.abs(a).max(initial=0), 1)).max(initial=0)))
    assert off < tolerance, off
    return off


def classes():
    import transformers

    names = [name for name in modernbert.__all__ if name.startswith("ModernBert") and "PreTrained" not in name]
    return [name for name in names if not name.endswith("Config") and hasattr(transformers, name)]


def model_of(name, **changes):
    import transformers

    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**CONFIG | changes)).eval()


def first_of(name, rows):
    """What runs a model: its first output at real tokens."""
    given = batch(choices="MultipleChoice" in name) | rows
    mask = given["attention_mask"].bool()

    def run(model):
        with torch.no_grad():
            first = model(**given)[0]
        return [first[mask] if first.shape[:2] == mask.shape else first]

    return run


def transformers():
    off = max(moved(model_of(name), first_of(name, {})) for name in classes())
    return f"{versions('transformers')}: {len(classes())} classes, {off:.0e}"


def sentence_transformers():
    import sentence_transformers as them

    path, some = folder(), texts()
    pairs = list(zip(some, some[::-1], strict=True))
    encoder = them.SentenceTransformer(path, device="cpu")
    off = [
        moved(encoder, lambda model: model.encode(some)),
        moved(encoder, lambda model: model.encode(some, batch_size=4, prompt="query: ", normalize_embeddings=True)),
        moved(them.CrossEncoder(path, num_labels=1, device="cpu"), lambda model: model.predict(pairs)),
        moved(them.SparseEncoder(path, device="cpu"), lambda model: model.encode(some)),
    ]
    kinds = ["SentenceTransformer", "CrossEncoder", "SparseEncoder"]
    if hasattr(them, "MultiVectorEncoder"):
        multi = them.MultiVectorEncoder(path, device="cpu")
        off += [moved(multi, lambda model: model.encode_document(some))]
        multi[0].query_expansion = {"strategy": "fixed", "attend": False, "token": None, "length": 100}
        off += [moved(multi, lambda model: model.encode_query(some))]
        kinds.append("MultiVectorEncoder")
    return f"{versions('sentence-transformers', 'transformers')}: {', '.join(kinds)}, {max(off):.0e}"


def pylate():
    from pylate import models

    some = texts()
    off = []
    for options in ({}, {"query_length": 100}, {"attend_to_expansion_tokens": True}, {"do_query_expansion": False}):
        colbert = models.ColBERT(folder(), device="cpu", **options)
        off.append(moved(colbert, lambda model: model.encode(some, is_query=True)))
    off.append(moved(colbert, lambda model: model.encode(some, is_query=False)))
    return f"{versions('pylate', 'sentence-transformers', 'transformers')}: ColBERT, {max(off):.0e}"


def setfit():
    from sentence_transformers import SentenceTransformer
    from setfit import SetFitModel
    from sklearn.linear_model import LogisticRegression

    some = texts()
    body = SentenceTransformer(folder(), device="cpu")
    head = LogisticRegression().fit(body.encode(some), [i % 2 for i in range(len(some))])
    model = SetFitModel(model_body=body, model_head=head)
    off = moved(model, lambda model: model.predict_proba(some))
    return f"{versions('setfit', 'sentence-transformers', 'transformers')}: SetFitModel, {off:.0e}"


def gliner():
    from gliner import GLiNER, GLiNERConfig

    path, some = folder(), texts(8)
    torch.manual_seed(0)
    config = GLiNERConfig(model_name=path, hidden_size=64, max_width=4, span_mode="markerV0")
    model = GLiNER.from_config(config).eval()

    def run(model):
        found = model.inference(some, ["city", "weather"], threshold=0.0, flat_ner=False)
        return [[entity["score"] for entity in entities] for entities in found]

    off = moved(model, run)
    assert sum(map(len, run(model))) > 0
    return f"{versions('gliner', 'transformers')}: {type(model).__name__}, {off:.0e}"
