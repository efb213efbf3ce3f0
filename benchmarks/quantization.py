"""What quantizing costs in accuracy on real data: hidden states, masked tokens, perplexity, and two fine-tuned models.

    python benchmarks/quantization.py ../shared/data --runs /tmp/runs --output benchmarks/quantization.json

The small models of the package are measured on texts that quantizing did not see. An encoder is fine-tuned for
clinc150 and for wnut17 (kept under --runs, and taken from there the next time); float32 and quantized models then
answer the same rows. Every quantized model is chosen by the package's own texts.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from modernbert import AutoModelForCausalLM, AutoModelForMaskedLM, Tokenizer, finetune, quantize
from modernbert.auto import load_as_saved
from modernbert.io.files import write_text
from modernbert.pipelines import small_model
from modernbert.training.finetuning import read_rows
from modernbert.training.tasks.catalog import TASKS
from modernbert.training.tasks.options import OPTIONS

SCHEMES = ("float32", "int8", "int8-weight-only", "int4", "int4-weight-only")
_LONGEST = 400


def packed(tokenizer: Tokenizer, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of texts end to end, and where each begins."""
    rows = tokenizer(texts, truncation=True, max_length=_LONGEST)["input_ids"]
    return torch.tensor([i for row in rows for i in row]), torch.tensor([0, *map(len, rows)]).cumsum(0).int()


def unseen(data: Path) -> list[str]:
    """Texts of three kinds."""
    texts = []
    for name, first, last, size in (
        ("wikipedia/articles.jsonl", 100, 180, 1500),
        ("asp_stories.jsonl", 50, 90, 900),
        ("code_python.jsonl", 0, 40, 900),
    ):
        lines = (data / "text" / name).read_text(encoding="utf-8").splitlines()[first:last]
        texts += [json.loads(line)["text"][:size] for line in lines]
    return texts


@torch.no_grad()
def language_models(texts: list[str]) -> list[dict[str, object]]:
    """Cosines of hidden states, and masked-token accuracy or perplexity."""
    rows: list[dict[str, object]] = []
    for kind, cls in (("encoder", AutoModelForMaskedLM), ("decoder", AutoModelForCausalLM)):
        tokenizer = Tokenizer.from_pretrained(small_model(kind))
        ids, starts = packed(tokenizer, texts)
        hidden = torch.rand(len(ids), generator=torch.Generator().manual_seed(0)) < 0.15
        given = ids.masked_fill(hidden, tokenizer.mask_token_id) if kind == "encoder" else ids
        right: torch.Tensor | None = None
        floats = sum(p.numel() for p in cls.from_pretrained(small_model(kind)).parameters()) * 4
        for scheme in SCHEMES:
            model = cls.from_pretrained(small_model(kind), dtype="float32")
            if scheme != "float32":
                quantize(model, scheme, tokenizer=tokenizer)
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
            model.optimize_for_inference()
            states = model.model(input_ids=given, cu_seqlens=starts).last_hidden_state
            right = states if right is None else right
            cosine = F.cosine_similarity(states, right, dim=-1)
            row: dict[str, object] = {"model": kind, "scheme": scheme, "tokens": len(ids), "size": size / floats}
            row |= {"cosine_min": float(cosine.min()), "below_0.999": int((cosine < 0.999).sum())}
            row["cosine_mean"] = float(cosine.mean())
            if kind == "encoder":
                found = torch.cat([model.score(x).argmax(-1) for x in states[hidden].split(2048)])
                row["masked_accuracy"] = float((found == ids[hidden]).float().mean())
            else:
                last = torch.zeros(len(ids), dtype=torch.bool)
                last[starts[1:].long() - 1] = True
                wanted = ids.roll(-1)[~last]
                parts = zip(states[~last].split(2048), wanted.split(2048), strict=True)
                loss = sum(float(F.cross_entropy(model.score(x), y, reduction="sum")) for x, y in parts) / len(wanted)
                row["perplexity"] = float(torch.tensor(loss).exp())
            rows.append(row)
            sys.stdout.write(f"{row}\n")
            sys.stdout.flush()
    return rows


def fine_tuned(data: Path, runs: Path) -> list[dict[str, object]]:
    """Accuracy of intents, F1 of names, on the rows that training did not see."""
    rows: list[dict[str, object]] = []
    cases = {
        "clinc150": ("text-classification", "classification/clinc150-train-val.json", None, 1, "accuracy"),
        "wnut17": ("token-classification", "ner/wnut17-train.conll", "ner/wnut17-dev.conll", 4, "f1"),
    }
    for name, (task, train, held_out, epochs, metric) in cases.items():
        folder, paths = runs / name, {"train": str(data / train)}
        if held_out is not None:
            paths["eval"] = str(data / held_out)
        if not (folder / "results.json").exists():
            finetune(task, **paths, output=folder, lr=1e-3, epochs=epochs, progress=False)
        settings = OPTIONS[task].of(paths, task)
        worker = TASKS[task](settings)
        seen, unseen_rows, is_held_out = read_rows(worker, None, None, settings, lambda line: None)
        worker.fit_labels([*seen, *unseen_rows] if is_held_out else seen)
        model = load_as_saved(folder, dtype="float32")
        worker.set_tokenizer(worker.load_tokenizer(folder, settings), model.config.max_position_embeddings)
        examples = worker.prepare(unseen_rows, False)
        for scheme in SCHEMES:
            model = load_as_saved(folder, dtype="float32")
            if scheme != "float32":
                quantize(model, scheme, tokenizer=Tokenizer.from_pretrained(folder))
            with torch.no_grad():
                figures = worker.evaluate_on(model.optimize_for_inference(), examples).metrics
            row: dict[str, object] = {"model": name, "scheme": scheme, "rows": len(examples), metric: figures[metric]}
            if model.quantization is not None:
                row |= {k: model.quantization.measured[k] for k in ("cosine_min", "agreement")}
            rows.append(row)
            sys.stdout.write(f"{row}\n")
            sys.stdout.flush()
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the real data")
    parser.add_argument("--runs", type=Path, required=True, help="where the fine-tuned models are kept")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    rows = [*language_models(unseen(args.data)), *fine_tuned(args.data, args.runs)]
    if args.output is not None:
        write_text(args.output, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
