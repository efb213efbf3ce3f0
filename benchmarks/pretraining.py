"""Speed of pretraining: preparing text compared with `datasets.map`, reading it compared with the model, and a step
compared with transformers' padded one.

    python benchmarks/pretraining.py TEXT TOKENIZER            # writes benchmarks/pretraining.json
    python benchmarks/pretraining.py TEXT TOKENIZER --only step

TEXT is a folder of .txt and .jsonl files, TOKENIZER a folder with tokenizer.json. Models are ModernBERT-base with
random weights; a step is forward, backward, clipping and AdamW in float32, on 16 texts of log-normal lengths with 30 %
of the tokens hidden; both libraries get the same texts and the same masks. Needs transformers and datasets.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).with_name("pretraining.json")


def main() -> None:
    """Run the comparisons and print their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--only", choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=[name for parts in PARTS.values() for name in parts], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(globals()[arguments.part](arguments)))
        return
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name, parts in PARTS.items():
        if arguments.only not in (None, name):
            continue
        rounds: dict[str, list[dict]] = {part: [] for part in parts}
        for _, part in itertools.product(range(1 if name == "prepare" else arguments.rounds), parts):
            rounds[part].append(_in_its_own_process(part))
        for part, results in rounds.items():
            found[part] = {key: statistics.median(result[key] for result in results) for key in results[0]}
            print(part, found[part], flush=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")
    if {"ours_prepare", "datasets_map"} <= found.keys():
        ratio = found["datasets_map"]["seconds"] / found["ours_prepare"]["seconds"]
        print(f"preparing text: {ratio:.2f} times as fast as datasets.map")
    if {"loader", "ours_step"} <= found.keys():
        ratio = found["loader"]["tokens_per_second"] / found["ours_step"]["tokens_per_second"]
        print(f"the loader alone: {ratio:,.0f} times the tokens a second of a training step of the base model")
    if {"padded_step", "ours_step"} <= found.keys():
        ratio = found["ours_step"]["tokens_per_second"] / found["padded_step"]["tokens_per_second"]
        print(f"a training step: {ratio:.2f} times the real tokens a second of transformers' padded one")


def _in_its_own_process(part: str) -> dict:
    done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--part", part], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _files(text: Path) -> list[Path]:
    return sorted(path for path in text.rglob("*") if path.suffix in (".txt", ".jsonl"))


def ours_prepare(arguments: argparse.Namespace) -> dict:
    """`modernbert prepare-data`, texts of 1,024 tokens on disk at the end."""
    from modernbert.training.pretraining.prepare import prepare_data

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        manifest = prepare_data([arguments.text], arguments.tokenizer, Path(folder) / "data", held_out=0.0)
        took = time.perf_counter() - began
    tokens = sum(source.tokens for source in manifest.sources.values())
    return {"seconds": took, "tokens": tokens, "tokens_per_second": tokens / took}


def datasets_map(arguments: argparse.Namespace) -> dict:
    """The same documents with `datasets.map` in a process a core: ids only, cut into rows of 1,024, on disk."""
    import datasets
    from tokenizers import Tokenizer

    datasets.disable_progress_bars()
    documents = []
    for path in _files(arguments.text):
        if path.suffix == ".txt":
            documents.append(path.read_text(encoding="utf-8", errors="replace"))
        else:
            documents += [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines() if line]
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))

    def encode(batch: dict) -> dict:
        ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)]
        return {"input_ids": [row[i : i + 1022] for row in ids for i in range(0, len(row), 1022)]}

    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        rows = datasets.Dataset.from_dict({"text": documents})
        mapped = rows.map(
            encode, batched=True, batch_size=16, num_proc=os.cpu_count(), remove_columns=["text"],
            cache_file_name=f"{folder}/rows.arrow",
        )  # fmt: skip
        took = time.perf_counter() - began
        tokens = sum(len(row) for row in mapped["input_ids"])
    return {"seconds": took, "tokens": tokens, "tokens_per_second": tokens / took}


def loader(arguments: argparse.Namespace) -> dict:
    """Packed passes of 8,192 tokens from mapped shards, hidden tokens drawn: all that a step needs of the data."""
    from modernbert.training.pretraining.feed import PretrainFeed
    from modernbert.training.pretraining.objectives import MaskedLM
    from modernbert.training.pretraining.options import PretrainOptions
    from modernbert.training.pretraining.prepare import prepare_data
    from modernbert.training.pretraining.run import Data
    from modernbert.training.pretraining.stream import PassStream

    with tempfile.TemporaryDirectory() as folder:
        some = _files(arguments.text)[:6]
        prepare_data(some, arguments.tokenizer, Path(folder) / "data", held_out=0.0)
        data = Data.open([Path(folder) / "data"])
        options = PretrainOptions(micro_tokens=8192, batch_tokens=8192, max_steps=10**6)
        feed = PretrainFeed(PassStream(data.train, 8192, 0), options, data.digest)
        masking, tokens, began = MaskedLM(data.tokenizer, 0.3), 0, time.perf_counter()
        for step in feed.steps(0, None):
            items = step.passes[0]
            batch = masking.batch([item.rows[0] for item in items], range(len(items)))
            tokens += len(batch["input_ids"])
            if time.perf_counter() - began > 5:
                break
        return {"tokens_per_second": tokens / (time.perf_counter() - began)}


def _batch() -> tuple:
    """16 texts of log-normal lengths (8 to 512 tokens), masked ids and labels of each."""
    import torch

    rng = torch.Generator().manual_seed(0)
    lengths = (torch.randn(16, generator=rng) * 0.9 + math.log(80)).exp().clamp(8, 512).long().tolist()
    texts = [torch.randint(1000, 50_000, (length,), generator=rng) for length in lengths]
    hidden = [torch.rand(length, generator=rng) < 0.3 for length in lengths]
    labels = [text.masked_fill(~some, -100) for text, some in zip(texts, hidden, strict=True)]
    return lengths, [text.masked_fill(some, 50_284) for text, some in zip(texts, hidden, strict=True)], labels


def _timed(step: object, lengths: list[int]) -> dict:
    step()
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    took = statistics.median(seconds)
    return {"seconds": took, "real_tokens": sum(lengths), "tokens_per_second": sum(lengths) / took}


def ours_step(arguments: argparse.Namespace) -> dict:
    """One step of ModernBERT-base, packed."""
    import torch

    from modernbert import ModernBertConfig, ModernBertForMaskedLM
    from modernbert.engines.cpu.library import denormals_flushed
    from modernbert.training.examples import pack_rows

    torch.manual_seed(0)
    model = ModernBertForMaskedLM(ModernBertConfig(sparse_prediction=True)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    lengths, texts, labels = _batch()
    packed = pack_rows(texts)

    def step() -> None:
        model(**packed, labels=torch.cat(labels)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with denormals_flushed():
        return _timed(step, lengths)


def padded_step(arguments: argparse.Namespace) -> dict:
    """The same step of transformers, padded to the longest text."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.ModernBertConfig(sparse_prediction=True, reference_compile=False)
    model = transformers.ModernBertForMaskedLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    lengths, texts, labels = _batch()
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=config.pad_token_id)
    truth = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()

    def step() -> None:
        model(input_ids=ids, attention_mask=mask, labels=truth).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _timed(step, lengths)


PARTS = {
    "prepare": ("ours_prepare", "datasets_map"),
    "loader": ("loader",),
    "step": ("ours_step", "padded_step"),
}

if __name__ == "__main__":
    main()
