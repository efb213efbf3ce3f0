"""Files that somebody changed at random: each load ends in a model that works, or in one of our errors in one line.

`MODERNBERT_FUZZ=20000 pytest tests/io/test_mutations.py` runs longer than the suite does, and
`MODERNBERT_FUZZ_SEED` says with which mutation to begin.
"""

import copy
import json
import os
import random
import resource
import shutil
import struct
import time

import pytest
import torch

import modernbert
from modernbert import SentenceEncoder, pipeline
from modernbert.auto import load_as_saved
from modernbert.errors import CheckpointError, ConfigError, InputError
from modernbert.models.encoder import ModernBertModel
from modernbert.models.sentence_encoder import Dense, Normalize
from modernbert.models.sentence_layout import SETTINGS, EmbeddingSettings
from modernbert.tools.info import checkpoint_info
from modernbert.training.pretraining.train_tokenizer import save_tokenizer, train_tokenizer
from tests.conftest import SMALL

COUNT = int(os.environ.get("MODERNBERT_FUZZ", "400"))
FIRST = int(os.environ.get("MODERNBERT_FUZZ_SEED", "0"))
PARTS = 8  # tests that share them
LONGEST = 500  # characters of an error, beside the folder's name
MOST_MEMORY = 2**30  # bytes that a load may add; the folders hold some hundred kilobytes

STRANGE = [
    None, True, False, 0, 1, -1, 2, 7, 1.5, -0.5, 10**6, 10**9, 10**12, 2**31, 2**32, 2**63, 10**30, float("nan"),
    float("inf"), "", "x", "5", "None", "\x1b[31m", "a\nb", "\0", "\ud800", "../x", "/etc/passwd", "x" * 3000, [], {},
    [None], [1], ["x"], [[1]], {"a": 1}, {"a": {"b": []}}, {"0": "x"}, {"content": "x"}, {"content": 3},
    {"type": "Replace", "pattern": {"Regex": "(a+)+$b"}, "content": "aa"},
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 5000},
    {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": ""}, "content": "ab" * 99}] * 9},
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Small checkpoints of each form, by name."""
    root = tmp_path_factory.mktemp("whole")
    backend = train_tokenizer(["some words to make a text of", "and more of them"] * 9, 300)
    values = {**SMALL, "vocab_size": 300, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    torch.manual_seed(0)
    encoder = modernbert.ModernBertConfig(**values)
    modernbert.ModernBertForMaskedLM(encoder).save_pretrained(root / "shards", max_shard_size="30KB")
    one = modernbert.ModernBertForSequenceClassification(encoder.replace(num_labels=1))
    one.save_pretrained(root / "cross")
    (root / "cross" / SETTINGS).write_text(json.dumps({"model_type": "CrossEncoder", "prompts": {"a": "b"}}))
    causal = modernbert.ModernBertDecoderForCausalLM(modernbert.ModernBertDecoderConfig(**values))
    causal.generation_config = {"max_new_tokens": 3, "num_beams": 1, "eos_token_id": [2], "do_sample": True}
    causal.save_pretrained(root / "decoder")
    quantized = modernbert.ModernBertForMaskedLM(encoder)
    settings = modernbert.QuantizationConfig(min_cosine=0.0, tokens=64)
    modernbert.quantize(quantized, settings).save_pretrained(root / "quantized")
    prompts = {"query": "q: ", "document": None}
    sentence = EmbeddingSettings(prompts=prompts, default_prompt_name="query", truncate_dim=8, max_length=20)
    SentenceEncoder(ModernBertModel(encoder), sentence, [], [Dense(32, 16), Normalize()]).save_pretrained(
        root / "sentence"
    )
    for folder in root.iterdir():
        save_tokenizer(backend, folder, 64)
    return {folder.name: folder for folder in sorted(root.iterdir())}


def places(value, path=()):
    """The path of every value inside of a parsed file; long lists and vocabularies are sampled."""
    yield path
    if isinstance(value, dict):
        for key in list(value)[:40]:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(min(len(value), 4)):
            yield from places(value[i], (*path, i))


def changed_json(rng, text):
    """One to three values of a JSON file replaced, removed, added or moved."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # of an earlier change
        return text.decode("latin-1")
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        path = rng.choice(list(places(value)))
        new = copy.deepcopy(rng.choice(STRANGE))
        if rng.random() < 0.03:
            return (
                json.dumps(value)[:-1]
                + ', "x": '
                + "[" * (levels := rng.choice([60, 70, 400, 9000]))
                + "]" * levels
                + "}"
            )
        if not path:
            if rng.random() < 0.1:
                return json.dumps(new)
            if isinstance(value, dict):
                value[rng.choice(["sliding_window", "x", "additional_special_tokens", "query_prefix", "dtype"])] = new
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        what = rng.random()
        if what < 0.7:
            holder[path[-1]] = new
        elif what < 0.85:
            del holder[path[-1]]
        elif isinstance(holder, dict):
            holder[rng.choice([str(path[-1]) + "x", "\x1b[31m", "0", "-1"])] = holder[path[-1]]
        else:
            holder.append(new)
    return json.dumps(value)


def changed_bytes(rng, content):
    """A file cut off, with other bytes, or with some twice."""
    content = bytearray(content or b"{}")
    what = rng.random()
    at = rng.randrange(len(content) + 1)
    if what < 0.3:
        return bytes(content[:at])
    if what < 0.8:
        for _ in range(rng.choice([1, 2, 20])):
            content[min(rng.randrange(len(content)), len(content) - 1)] = rng.randrange(256)
        return bytes(content)
    return bytes(content[:at] + content[max(0, at - 50) :])


def changed_weights(rng, content):
    """A safetensors file with another header."""
    (length,) = struct.unpack("<Q", content[:8])
    if rng.random() < 0.15:
        return struct.pack("<Q", rng.choice([0, 1, length + 1, 2**40, 2**63])) + content[8:]
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):  # of an earlier change
        return content[:-1]
    names = [name for name in header if name != "__metadata__"]
    for _ in range(rng.choice([1, 1, 2]) if names else 0):
        name = rng.choice(names)
        of = header.get(name, {})
        what = rng.randrange(6)
        if what == 0:
            prefix = rng.choice(["module.", "x.", "\x1b[31m", "model.layers.99.", "a\n" * 200])
            header[prefix + name] = header.pop(name, of)
        elif what == 1 and "dtype" in of:
            of["dtype"] = rng.choice(["F16", "BF16", "F64", "I64", "I8", "U8", "BOOL", "F8_E4M3", "X", 5, None])
        elif what == 2 and of.get("shape"):
            of["shape"][rng.randrange(len(of["shape"]))] = rng.choice([0, 1, -1, 2**40, 2**63, 1.5, None])
        elif what == 3 and of.get("shape"):
            of["shape"] = rng.choice([of["shape"][::-1], [1, *of["shape"]], [], [7]])
        elif what == 4 and "data_offsets" in of:
            of["data_offsets"] = rng.choice([[0, 0], [8, 4], [0, 2**62], "x", [of["data_offsets"][0]]])
        else:
            header.pop(name, None)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def mutate(rng, folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice(files)
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        new = changed_weights(rng, content) if rng.random() < 0.8 else changed_bytes(rng, content)
    elif rng.random() < 0.85:
        new = changed_json(rng, content).encode("utf-8", "surrogatepass")
    else:
        new = changed_bytes(rng, content)
    path.write_bytes(new)
    return path.relative_to(folder)


def use(name, folder):
    """Load a folder in all ways that fit it, and let it answer."""
    load_as_saved(folder)
    checkpoint_info(str(folder), [8])
    if name == "decoder":
        pipe = pipeline("text-generation", folder)
        pipe("some words", max_new_tokens=2)
    elif name == "sentence":
        pipeline("sentence-embedding", folder)(["some words", "text"])
    elif name == "cross":
        pipeline("text-ranking", folder)(query="some", documents=["words", "text"])
    else:
        pipe = pipeline("fill-mask", folder)
        pipe(f"some {pipe.tokenizer.mask_token or '[MASK]'} text")


@pytest.mark.filterwarnings("ignore")  # of libraries, about what is in the files
@pytest.mark.parametrize("part", range(PARTS))
def test_changed_files_end_in_a_model_or_one_line(folders, tmp_path, part):
    failures = []
    for seed in range(FIRST + part, FIRST + COUNT, PARTS):
        rng = random.Random(seed)
        name = rng.choice(list(folders))
        folder = shutil.copytree(folders[name], tmp_path / "x")
        changed = [mutate(rng, folder) for _ in range(rng.choice([1, 1, 1, 2]))]
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        try:
            use(name, folder)
        except (CheckpointError, ConfigError, InputError) as error:
            message = str(error).replace(str(folder), "")
            if len(message) > LONGEST or not message.isprintable():
                failures.append(f"seed {seed}, {name}, {changed}: a message of {len(message)} characters: {message!r}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failures.append(f"seed {seed}, {name}, {changed}: {type(error).__name__}: {str(error)[:200]!r}")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if grown > MOST_MEMORY:
            failures.append(f"seed {seed}, {name}, {changed}: {grown / 2**20:.0f} MiB")
        if time.perf_counter() - began > 60:
            failures.append(f"seed {seed}, {name}, {changed}: {time.perf_counter() - began:.0f} s")
        shutil.rmtree(tmp_path / "x")
    assert not failures, "\n".join(failures)
