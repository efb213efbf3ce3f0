"""Fine-tuning beside the Trainer of transformers: the same checkpoint, rows, tokens a step, steps and schedule.

    python benchmarks/finetuning.py DATA                     # all tasks, three seeds, a table at the end
    python benchmarks/finetuning.py DATA --only wnut17 --seeds 1 --results mine.json

DATA is a folder with the files that CASES names. Each product trains in a process of its own, one after the other: we
in float32 and, where the processor multiplies it, in bfloat16, transformers in float32 as it does by default; all
finished models are evaluated by the same code. transformers trains as its own examples do: batches padded to their
longest text, and windows of question answering to 384 tokens. Needs transformers and sentence-transformers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).with_name("finetuning.json")
_SQUAD = {"train": "question_answering/squad-v1-train.json", "eval": "question_answering/squad-v1-dev.json"}
_LEVELS = {"train": "classification/onestopenglish.jsonl", "group_by": "doc", "batch_size": 8, "max_steps": 20}


class Case(NamedTuple):
    """A task on data: the metric that is compared, what guessing gives of it, and options; paths are below DATA."""

    task: str
    metric: str
    chance: float
    options: dict


CASES = {
    "clinc150": Case(
        "text-classification", "accuracy", 1 / 150,
        {"train": "classification/clinc150-train-val.json", "max_steps": 240, "lr": 1e-3},
    ),
    "banking77": Case(
        "text-classification", "accuracy", 1 / 77,
        {"train": "classification/banking77-train.csv", "max_steps": 200, "lr": 1e-3},
    ),
    "goemotions": Case(
        "text-classification", "average_precision", 0.042,  # the labels' mean share of the texts
        {"train": "classification/goemotions-dev.tsv", "header": "text,labels,id", "problem": "multi-label",
         "labels": "classification/goemotions-labels.txt", "max_steps": 120, "lr": 1e-3},
    ),
    "onestopenglish": Case("text-classification", "accuracy", 1 / 3, {**_LEVELS, "lr": 5e-4}),
    "onestopenglish, values": Case(
        "text-classification", "pearson", 0.0, {**_LEVELS, "lr": 5e-4, "problem": "regression", "labels": "ele,int,adv"}
    ),
    "wnut17": Case(
        "token-classification", "f1", 0.0,
        {"train": "ner/wnut17-train.conll", "eval": "ner/wnut17-dev.conll", "max_steps": 160, "lr": 1e-3},
    ),
    "squad-v1": Case("question-answering", "f1", 0.0, {**_SQUAD, "max_steps": 40, "lr": 5e-4}),
    "codah": Case(
        "multiple-choice", "accuracy", 1 / 4,
        {"train": "multiple_choice/codah-train.tsv", "eval": "multiple_choice/codah-dev.tsv", "max_steps": 50,
         "header": "category,prompt,a,b,c,d,label", "column": ["choices=a,b,c,d"], "lr": 2e-4},
    ),
    "commonsense_qa": Case(
        "multiple-choice", "accuracy", 1 / 5,
        {"train": "multiple_choice/commonsense_qa-train.jsonl", "max_steps": 50, "lr": 2e-4},
    ),
    "squad pairs": Case(
        "sentence-embedding", "recall_at_1", 1 / 188, {**_SQUAD, "batch_size": 32, "max_steps": 20, "lr": 5e-4}
    ),
    "squad pairs, at 10": Case("", "recall_at_10", 10 / 188, {}),  # of the same runs
}  # fmt: skip
PRODUCTS = ("modernbert", "bfloat16", "transformers")
_PATHS = ("train", "eval", "labels")
_SHARED = {"optimizer": "adamw", "weight_decay": 0.01, "eps": 1e-8, "beta2": 0.999}


def main() -> None:
    """Run the comparisons and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="*", default=[name for name in CASES if CASES[name].task], choices=list(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--worker", choices=PRODUCTS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(_work(given.worker, given.only[0], given.data, given.seeds)))
        return
    from modernbert.nn.linear import multiplies_bfloat16

    results = json.loads(given.results.read_text()) if given.results.exists() else {}
    for name in given.only:
        results[name] = {}
        for product in PRODUCTS:
            if product == "bfloat16" and not multiplies_bfloat16():
                continue
            command = [sys.executable, __file__, str(given.data), "--worker", product, "--only", name]
            command += ["--seeds", str(given.seeds)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            results[name][product] = json.loads(done.stdout.splitlines()[-1])
            print(name, product, results[name][product], flush=True)
        given.results.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


def table(results: dict) -> str:
    """The results as Markdown."""
    lines = [
        "| data | metric | chance | modernbert | in bfloat16 | transformers | seconds | | | times faster | |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, case in CASES.items():
        found = results.get(name if case.task else name.partition(",")[0])
        if not found:
            continue
        cells, times = [name, case.metric, f"{case.chance:.3f}"], {}
        for product in PRODUCTS:
            if product not in found:
                cells.append("")
                continue
            values = [figures[case.metric] for figures in found[product]["figures"]]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.3f} ± {spread:.3f}")
            times[product] = statistics.median(found[product]["seconds"])
        cells += [f"{times[product]:.1f}" if product in times else "" for product in PRODUCTS]
        theirs = times["transformers"]
        cells += [f"{theirs / times[product]:.2f}" if product in times else "" for product in PRODUCTS[:2]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _work(product: str, name: str, data: Path, seeds: int) -> dict:
    task, options = CASES[name].task, {**CASES[name].options, **_SHARED}
    for key in _PATHS:
        if key in options and (data / str(options[key])).exists():
            options[key] = str(data / options[key])
    if product == "transformers":
        runs = [_theirs(task, options, seed) for seed in range(seeds)]
    else:
        options["precision"] = "bfloat16" if product == "bfloat16" else "float32"
        runs = [_ours(task, options, seed) for seed in range(seeds)]
    return {
        "seconds": [run["seconds"] for run in runs],
        "tokens_per_second": [run["tokens"] / run["seconds"] for run in runs],
        "figures": [run["figures"] for run in runs],
    }


def _ours(task: str, options: dict, seed: int) -> dict:
    from modernbert import finetune

    folder = Path(tempfile.mkdtemp())
    run = finetune(task, **options, output=folder / "run", seed=seed, keep_best=False, progress=False)
    shutil.rmtree(folder)
    return {"seconds": run.outcome.seconds, "tokens": run.outcome.tokens, "figures": run.metrics}


def _theirs(task: str, options: dict, seed: int) -> dict:
    """The peer's run on our rows, with our evaluation."""
    import torch
    import transformers

    from modernbert.pipelines import small_model
    from modernbert.training.finetuning import read_rows
    from modernbert.training.schedules import make_schedule
    from modernbert.training.tasks.catalog import TASKS
    from modernbert.training.tasks.options import OPTIONS

    transformers.logging.set_verbosity_error()
    settings = OPTIONS[task].of({**options, "seed": seed}, task)
    worker = TASKS[task](settings)
    train, held, alone = read_rows(worker, None, None, settings, lambda line: None)
    worker.fit_labels([*train, *held] if alone else train)
    small = small_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        small, **({"add_prefix_space": True} if task == "token-classification" else {})
    )
    folder = Path(tempfile.mkdtemp())
    transformers.set_seed(seed)
    counted = {"tokens": 0}
    arguments = {
        "output_dir": str(folder), "max_steps": settings.max_steps, "per_device_train_batch_size": settings.batch_size,
        "learning_rate": settings.lr, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "seed": seed,
        "logging_strategy": "no", "max_grad_norm": settings.max_grad_norm,
    }  # fmt: skip
    schedule = make_schedule(settings.schedule, settings.max_steps, settings.warmup, settings.decay)

    def optimizers(model: torch.nn.Module) -> tuple:
        groups = [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        betas = (settings.beta1, settings.beta2)
        adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps, fused=True)
        return adamw, torch.optim.lr_scheduler.LambdaLR(adamw, schedule)

    if task == "sentence-embedding":
        trainer, model = _sentence_trainer(
            small, [(row.values["anchor"], row.values["positive"]) for row in train], arguments, optimizers, counted
        )
    else:
        trainer, model = _trainer(task, worker, train, tokenizer, small, arguments, optimizers, counted)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    worker.set_tokenizer(worker.load_tokenizer(small, settings), 512)
    trained = worker.load(folder / "model", settings).optimize_for_inference()
    with torch.no_grad():
        evaluation = worker.evaluate_on(trained, worker.prepare(held, False))
    shutil.rmtree(folder)
    return {"seconds": seconds, "tokens": counted["tokens"], "figures": evaluation.metrics}


def _counting(collate, counted: dict):
    def run(features: list) -> dict:
        batch = collate(features)
        counted["tokens"] += int(batch["attention_mask"].sum())
        return batch

    return run


def _trainer(task, worker, rows, tokenizer, small, arguments, optimizers, counted):
    import torch
    import transformers
    from datasets import Dataset

    limit = {"truncation": True, "max_length": 512}
    changes = worker.config_changes()
    kinds = {
        "text-classification": transformers.AutoModelForSequenceClassification,
        "token-classification": transformers.AutoModelForTokenClassification,
        "question-answering": transformers.AutoModelForQuestionAnswering,
        "multiple-choice": transformers.AutoModelForMultipleChoice,
    }
    model = kinds[task].from_pretrained(small, dtype=torch.float32, **changes)
    collate = transformers.DataCollatorWithPadding(tokenizer)
    values = [row.values for row in rows]
    if task == "text-classification":
        encoded = tokenizer([v["text"] for v in values], **limit)
        labels = [worker.label_of(row) for row in rows]
        if worker.problem == "multi-label":
            labels = [[float(i in wanted) for i in range(changes["num_labels"])] for wanted in labels]
        data = {**encoded, "labels": labels}
    elif task == "token-classification":
        encoded = tokenizer([v["tokens"] for v in values], is_split_into_words=True, **limit)
        labels = []
        for i, row in enumerate(rows):
            words, numbers = encoded.word_ids(i), [worker.names.number(tag, "") for tag in row.values["tags"]]
            labels.append([-100 if w is None or w == words[j - 1] else numbers[w] for j, w in enumerate(words)])
        data = {**encoded, "labels": labels}
        collate = transformers.DataCollatorForTokenClassification(tokenizer)
    elif task == "multiple-choice":
        from modernbert.training.tasks.multiple_choice import choice_number

        rows_ids = []
        for v in values:
            rows_ids.append(tokenizer([v["prompt"]] * len(v["choices"]), list(v["choices"]), **limit))
        data = {key: [e[key] for e in rows_ids] for key in ("input_ids", "attention_mask")}
        data["labels"] = [choice_number(row) for row in rows]
        collate = transformers.DataCollatorForMultipleChoice(tokenizer)
    else:
        examples = _windows(worker, rows, tokenizer)
        data = {key: [e[key] for e in examples] for key in examples[0]}
        collate = transformers.default_data_collator
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**arguments),
        train_dataset=Dataset.from_dict(data),
        data_collator=_counting(collate, counted),
        optimizers=optimizers(model),
    )
    return trainer, model


def _windows(worker, rows, tokenizer) -> list[dict]:
    """Windows of 384 tokens, all padded to that, with the places of the first answer."""
    out = []
    for row in rows:
        record = worker.record_of(row)
        encoded = tokenizer(
            record["question"], record["context"], truncation="only_second", max_length=384, stride=128,
            padding="max_length", return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        text, start = record["answers"][0]
        end = start + len(text)
        for i, offsets in enumerate(encoded["offset_mapping"]):
            inside = [j for j, part in enumerate(encoded.sequence_ids(i)) if part == 1]
            first, last = 0, 0
            if offsets[inside[0]][0] <= start and offsets[inside[-1]][1] >= end:
                first = max(j for j in inside if offsets[j][0] <= start)
                last = min(j for j in inside if offsets[j][1] >= end)
            row_out = {key: encoded[key][i] for key in ("input_ids", "attention_mask")}
            out.append({**row_out, "start_positions": first, "end_positions": last})
    return out


def _sentence_trainer(small, pairs, arguments, optimizers, counted):
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = SentenceTransformer(str(small), device="cpu", model_kwargs={"dtype": "float32"})
    model.max_seq_length = 512
    forward = model.forward

    def counting(features, **kwargs):
        counted["tokens"] += int(features["attention_mask"].sum())
        return forward(features, **kwargs)

    model.forward = counting
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**arguments),
        train_dataset=Dataset.from_list([{"anchor": a, "positive": b} for a, b in pairs]),
        loss=MultipleNegativesRankingLoss(model, scale=20.0),
        optimizers=optimizers(model),
    )
    return trainer, model


if __name__ == "__main__":
    main()
