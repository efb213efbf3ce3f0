"""A run beside a padded loop over the transformers model, written by hand: first loss, and weights after ten steps.

Parity is a matter of float32, and the runs ask for it: "auto" is bfloat16 on some processors and not on others.
Products in bfloat16 have a test and a tolerance of their own.
"""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from modernbert import finetune
from modernbert.models.sentence_encoder import SentenceEncoder
from modernbert.training.examples import StepPlan, by_tokens
from modernbert.training.schedules import make_schedule
from modernbert.training.tasks.catalog import TASKS
from modernbert.training.tasks.data import Row
from modernbert.training.tasks.options import OPTIONS
from tests.training.runs import assert_close_by_name, history
from tests.training.tasks.conftest import TASK_ROWS

PEERS = {
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "causal-lm": "AutoModelForCausalLM",
    "text-ranking": "AutoModelForSequenceClassification",
    "sentence-embedding": "AutoModel",
}
OPTIONS_OF_RUN = {
    "max_steps": 10, "batch_size": 8, "lr": 3e-3, "optimizer": "adamw", "weight_decay": 0.1, "schedule": "cosine",
    "warmup": 0.2, "max_grad_norm": 0.5, "held_out": 0.0, "progress": False, "seed": 7, "precision": "float32",
}  # fmt: skip


class Stepper:
    """AdamW with clipping and the run's learning rates."""

    def __init__(self, model):
        self.model = model
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)
        self.schedule = make_schedule("cosine", 10, 0.2, 0.0)

    def __call__(self, number):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        for group in self.adamw.param_groups:
            group["lr"] = 3e-3 * self.schedule(number)
        self.adamw.step()
        self.adamw.zero_grad()


def planned(examples):
    """The examples of each of ten steps, by their numbers."""
    plan = StepPlan(np.array([example.tokens for example in examples]), 8, None, 7)
    return [step for epoch in range(10) for step in plan.epoch(epoch)][:10]


def padded(examples, pad):
    """All rows of examples in one padded grid, and where they are real."""
    rows = [list(row) for example in examples for row in example.rows]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def loss_sum(task, worker, model, examples):
    """The sum of the losses of some examples, and how many labels there are, from the padded model's outputs."""
    ids, mask = padded(examples, model.config.pad_token_id)
    if task == "multiple-choice":
        total = torch.zeros(())
        for example in examples:
            one, real = padded([example], model.config.pad_token_id)
            scores = model(input_ids=one[None], attention_mask=real[None]).logits[0]
            total = total + F.cross_entropy(scores, torch.tensor(example.label), reduction="sum")
        return total, len(examples)
    out = model(input_ids=ids, attention_mask=mask)
    if task == "text-classification":
        labels = torch.tensor([example.label for example in examples])
        return F.cross_entropy(out.logits, labels, reduction="sum"), len(examples)
    if task == "text-ranking":
        labels = torch.tensor([[example.label] for example in examples])
        return F.binary_cross_entropy_with_logits(out.logits, labels, reduction="sum"), len(examples)
    if task == "token-classification":
        labels = torch.full(ids.shape, -100)
        for row, example in enumerate(examples):
            labels[row, : len(example.label)] = torch.tensor(example.label)
        return F.cross_entropy(out.logits.transpose(1, 2), labels, reduction="sum"), int((labels != -100).sum())
    if task == "causal-lm":
        labels = ids.masked_fill(mask == 0, -100)[:, 1:]
        return F.cross_entropy(out.logits[:, :-1].transpose(1, 2), labels, reduction="sum"), int((labels != -100).sum())
    if task == "question-answering":
        total = torch.zeros(())
        for scores, column in ((out.start_logits, 0), (out.end_logits, 1)):
            right = torch.tensor([example.label[column] for example in examples])
            total = total + F.cross_entropy(scores.masked_fill(mask == 0, -1e30), right, reduction="sum") / 2
        return total, len(examples)
    raise AssertionError(task)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("task", [name for name in PEERS if name != "sentence-embedding"])
def test_a_run_equals_a_padded_loop(task, parts, base, tmp_path):
    rows, kind, changes = TASK_ROWS[task]
    folder, data = base(kind, **changes), rows()
    micro = {1: 100_000, 4: 40}[parts]
    run = finetune(task, data, output=tmp_path / "run", model=folder, micro_tokens=micro, **OPTIONS_OF_RUN)
    settings = OPTIONS[task](**{k: v for k, v in OPTIONS_OF_RUN.items() if k != "progress"}, micro_tokens=micro)
    worker = TASKS[task](settings)
    given = [Row({**row, "_record": row}, f"row {i}") for i, row in enumerate(data)]
    worker.fit_labels(given)
    worker.set_tokenizer(worker.load_tokenizer(folder, settings), 64)
    examples = worker.prepare(given, True)
    peer = getattr(transformers, PEERS[task]).from_pretrained(folder, attn_implementation="eager").train()
    step = Stepper(peer)
    steps = planned(examples)
    passes = []
    for number, chosen in enumerate(steps):
        picked = [examples[i] for i in chosen]
        passes.append(len(by_tokens([e.tokens for e in picked], micro)))
        size = -(-len(picked) // parts)
        pieces = [picked[i : i + size] for i in range(0, len(picked), size)]
        with torch.no_grad():
            labels = sum(loss_sum(task, worker, peer, piece)[1] for piece in pieces)
        loss = 0.0
        for piece in pieces:
            part = loss_sum(task, worker, peer, piece)[0] / labels
            part.backward()
            loss += float(part.detach())
        if number == 0:
            assert history(tmp_path / "run")[0]["loss"] == pytest.approx(loss, abs=1e-5)
        step(number)
    ours, theirs = run.model.state_dict(), peer.state_dict()
    assert len(steps) == 10
    assert (max(passes) == 1) == (parts == 1)
    if task in ("question-answering", "multiple-choice"):
        # Scores that a softmax compares have no gradient by what is added to all; Adam makes steps of its rounding.
        del theirs["classifier.bias"]
    assert_close_by_name(ours, theirs, 1e-5)


def test_masked_language_modelling_equals_a_padded_loop(base, tmp_path):
    """What is hidden is drawn by the run; the loop is shown the same batches."""
    folder, seen = base("ModernBertForMaskedLM"), []
    collate = TASKS["masked-lm"].collate

    def spy(self, examples, generator):
        batch = collate(self, examples, generator)
        seen.append(batch)
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TASKS["masked-lm"], "collate", spy)
        run = finetune(
            "masked-lm", TASK_ROWS["masked-lm"][0](), output=tmp_path / "run", model=folder, **OPTIONS_OF_RUN,
        )  # fmt: skip
    peer = transformers.AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager").train()
    step = Stepper(peer)
    assert len(seen) == 10
    for number, batch in enumerate(seen):
        starts = batch["cu_seqlens"].tolist()
        width = max(b - a for a, b in itertools.pairwise(starts))
        grid = torch.full((len(starts) - 1, width), peer.config.pad_token_id)
        labels, mask = torch.full_like(grid, -100), torch.zeros_like(grid)
        for row, (a, b) in enumerate(itertools.pairwise(starts)):
            grid[row, : b - a], labels[row, : b - a] = batch["input_ids"][a:b], batch["labels"][a:b]
            mask[row, : b - a] = 1
        logits = peer(input_ids=grid, attention_mask=mask).logits
        F.cross_entropy(logits.transpose(1, 2), labels).backward()
        step(number)
    assert_close_by_name(run.model.state_dict(), peer.state_dict(), 1e-5)


@pytest.mark.parametrize("matryoshka", [[], [8, 16]])
@pytest.mark.parametrize("micro", [100_000, 60])
def test_contrastive_training_equals_a_padded_loop(base, tmp_path, micro, matryoshka):
    """With and without cached gradients; duplicates of a positive are no wrong answers."""
    folder, rows = base("ModernBertModel"), TASK_ROWS["sentence-embedding"][0]()
    rows += [{"anchor": "q again", "positive": rows[0]["positive"]} for _ in range(4)]
    run = finetune(
        "sentence-embedding", rows, output=tmp_path / "run", model=folder, micro_tokens=micro, matryoshka=matryoshka,
        **OPTIONS_OF_RUN,
    )  # fmt: skip
    settings = OPTIONS["sentence-embedding"](batch_size=8, seed=7)
    worker = TASKS["sentence-embedding"](settings)
    worker.set_tokenizer(worker.load_tokenizer(folder, settings), 64)
    examples = worker.prepare([Row({**row, "_record": row}, "row") for row in rows], True)
    peer = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").train()
    step = Stepper(peer)
    steps = planned(examples)
    for number, chosen in enumerate(steps):
        picked = [examples[i] for i in chosen]
        ids, mask = padded(picked, peer.config.pad_token_id)
        states = peer(input_ids=ids, attention_mask=mask).last_hidden_state
        vectors_ = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        loss = torch.zeros(())
        for width in (*matryoshka, 48):
            unit = F.normalize(vectors_[:, :width], dim=-1)
            for i, example in enumerate(picked):
                rivals = [j for j, other in enumerate(picked) if i == j or other.label[0] != example.label[0]]
                scores = torch.stack([unit[2 * i] @ unit[2 * j + 1] / 0.05 for j in rivals])
                loss = loss + F.cross_entropy(scores, torch.tensor(rivals.index(i))) / len(picked)
        loss.backward()
        step(number)
    assert_close_by_name(load_file(tmp_path / "run" / "model.safetensors"), peer.state_dict(), 2e-5)
    assert isinstance(run.model, SentenceEncoder)


@pytest.mark.parametrize("task", list(TASKS))
def test_products_in_bfloat16_give_the_losses_of_float32_but_for_their_rounding(task, base, tmp_path):
    """On every processor, with or without such products of its own. The weights stay float32."""
    rows, kind, changes = TASK_ROWS[task]
    folder, losses = base(kind, **changes), {}
    for precision in ("float32", "bfloat16"):
        options = {**OPTIONS_OF_RUN, "precision": precision, "max_steps": 3, "lr": 1e-3}
        output = tmp_path / precision
        run = finetune(task, rows(16), output=output, model=folder, **options)
        losses[precision] = [row["loss"] for row in history(output)]
        assert {value.dtype for value in load_file(output / "model.safetensors").values()} == {torch.float32}
        assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    # A loss far below 1 moves by more of itself: it is a difference of larger numbers.
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=2e-2, abs=1e-2)
    assert losses["bfloat16"] != losses["float32"]
