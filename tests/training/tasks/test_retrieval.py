"""Training for retrieval: losses and gradients beside padded formulas, teachers, folders, runs that go on."""

import contextlib
import json
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from modernbert import finetune, pipeline
from modernbert.errors import InputError
from modernbert.retrieval.maxsim import packed_maxsim
from modernbert.training.tasks.catalog import TASKS
from modernbert.training.tasks.data import read_tables, rows_of
from modernbert.training.tasks.options import OPTIONS
from tests.training.runs import TWO_PROCESSES, assert_close_by_name, finish
from tests.training.tasks.conftest import pair_rows, ranking_rows

KINDS = {
    "sentence-embedding": "ModernBertModel",
    "late-interaction": "ModernBertModel",
    "sparse-embedding": "ModernBertForMaskedLM",
    "text-ranking": "ModernBertForSequenceClassification",
}
SMALL = {"num_hidden_layers": 2}


def hard_rows(count=24, wrong=2, scores=True):
    """Pairs with negatives, which are other rows' positives, and a teacher's scores."""
    rows = pair_rows(count)
    for i, row in enumerate(rows):
        row["negatives"] = [rows[(i + j) % count]["positive"] for j in range(1, wrong + 1)]
        if scores:
            row["scores"] = [4.0 + i % 3, *(float(j - i % 2) for j in range(wrong))]
    return rows


def prepared(task, folder, rows, **options):
    """A task, its model and its examples."""
    settings = OPTIONS[task](**options)
    worker = TASKS[task](settings)
    found = rows_of(read_tables(rows, None), worker.fields, {})[0]
    worker.fit_labels(found)
    torch.manual_seed(0)
    model = worker.load(folder, settings)
    worker.set_tokenizer(worker.load_tokenizer(folder, settings), 64)
    return worker, model, worker.prepare(found, True)


def passes(backward):
    return lambda is_last: contextlib.nullcontext(backward)


@pytest.mark.parametrize("block", [2**20, 40])
def test_the_gradients_of_packed_maxsim_are_those_of_a_padded_product(block, monkeypatch):
    monkeypatch.setattr("modernbert.retrieval.maxsim._PRODUCTS", block)
    torch.manual_seed(0)
    sizes, lengths = [3, 1, 6], [2, 9, 1, 5, 12]
    query_qD, document_TD = (torch.randn(sum(n), 8, requires_grad=True) for n in (sizes, lengths))
    scores = packed_maxsim(query_qD, document_TD, sizes, lengths)
    expected = []
    for query in query_qD.split(sizes):
        padded = torch.nn.utils.rnn.pad_sequence(document_TD.split(lengths), batch_first=True)
        real = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        products = torch.einsum("qd,btd->bqt", query, padded).masked_fill(~real[:, None], float("-inf"))
        expected.append(products.amax(2).sum(1))
    expected = torch.stack(expected)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    weights = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((x * weights).sum(), (query_qD, document_TD)) for x in (scores, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def by_formula(task, worker, vectors, examples, batch):
    """The loss of a step, text by text, from padded or dense vectors."""
    options, spans = worker.options, batch["cu_seqlens"].tolist()
    rows = [row for example in examples for row in example.rows]
    if task == "late-interaction":
        of_rows = [
            vectors[a:b][torch.tensor(row.kept)] for a, b, row in zip(spans[:-1], spans[1:], rows, strict=True)
        ]  # fmt: skip
    else:
        of_rows = list(vectors)
    sides, numbers, own, place = ([], []), [], [], 0
    for example in examples:
        sides[0].append(of_rows[place])
        own.append(list(range(len(numbers), len(numbers) + len(example.label))))
        sides[1].extend(of_rows[place + 1 : place + len(example.rows)])
        numbers += example.label
        place += len(example.rows)

    def similarity(a, b):
        return (a @ b.T).max(1).values.sum() if task == "late-interaction" else a @ b

    loss = torch.zeros(())
    for anchor, mine, example in zip(sides[0], own, examples, strict=True):
        if options.loss == "contrastive":
            rivals = [i for i, n in enumerate(numbers) if i == mine[0] or n != numbers[mine[0]]]
            scores = torch.stack([similarity(anchor, sides[1][i]) for i in rivals]) / options.temperature
            loss = loss + F.cross_entropy(scores, torch.tensor(rivals.index(mine[0])))
            continue
        ours = torch.stack([similarity(anchor, sides[1][i]) for i in mine]) / options.temperature
        theirs = torch.tensor(example.record["scores"])
        if options.loss == "kl":
            shares = theirs.softmax(0)
            loss = loss + (shares * (shares.log() - ours.softmax(0).log())).sum()
        else:
            loss = loss + (((ours[0] - ours[1:]) - (theirs[0] - theirs[1:])) ** 2).mean()
    loss = loss / len(examples)
    if task == "sparse-embedding":
        for side, weight in zip(sides, (options.query_flops, options.document_flops), strict=True):
            loss = loss + worker.rise * weight * (torch.stack(side).mean(0) ** 2).sum()
    return loss


@pytest.mark.parametrize("loss", ["contrastive", "margin-mse", "kl"])
@pytest.mark.parametrize("task", ["late-interaction", "sparse-embedding"])
def test_losses_and_their_gradients_are_those_of_the_formula(task, loss, base):
    rows = hard_rows(6)
    rows.append({**rows[0], "anchor": "q again"})  # its positive is no wrong answer to the first
    options = {"loss": loss, "temperature": 0.7}
    options |= {"query_length": 16} if task == "late-interaction" else {"query_flops": 0.3, "document_flops": 0.1}
    worker, model, examples = prepared(task, base(KINDS[task], **SMALL), rows, **options)
    worker.at_step(1, 9)
    batch = worker.collate(examples, [0] * len(examples))
    vectors = worker.vectors(model, batch).detach().requires_grad_()
    step = {**batch, "lengths": batch["cu_seqlens"].diff()}
    ours = worker.contrast(vectors, step, float(len(examples)))
    theirs = by_formula(task, worker, vectors, examples, batch)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
    gradients = [torch.autograd.grad(x, vectors)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
    assert gradients[0].abs().max() > 1e-3

    # In several passes, with cached gradients, the weights get the gradients of one.
    found = []
    for parts in ([examples], [examples[:2], examples[2:5], examples[5:]]):
        model.zero_grad()
        batches = [worker.collate(part, [0] * len(part)) for part in parts]
        value = worker.losses(model, batches, float(len(examples)), passes(lambda x: x.backward()))
        torch.testing.assert_close(value, theirs.detach(), rtol=1e-4, atol=1e-4)
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["margin-mse", "kl"])
def test_a_cross_encoder_learns_the_scores_of_a_row(loss, base):
    rows = [{"query": r["anchor"], "document": r["positive"], **r} for r in hard_rows(5)]
    worker, model, examples = prepared("text-ranking", base(KINDS["text-ranking"], num_labels=1), rows, loss=loss)
    batch = worker.collate(examples, [0] * 5)
    assert worker.count(batch) == 5
    value = worker.losses(model, [batch], 5.0, passes(lambda x: x.backward()))
    expected = torch.zeros(())
    for example in examples:
        logits = torch.cat([model(torch.tensor([list(row)])).logits[0] for row in example.rows])
        theirs = torch.tensor(example.label)
        if loss == "kl":
            expected = expected + F.kl_div(logits.log_softmax(0), theirs.softmax(0), reduction="sum") / 5
        else:
            expected = expected + F.mse_loss(logits[0] - logits[1:], theirs[0] - theirs[1:]) / 5
    torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=1e-5)


def test_the_penalty_rises_quadratically():
    worker = TASKS["sparse-embedding"](OPTIONS["sparse-embedding"](flops_warmup=0.5))
    rises = []
    for step in range(20):
        worker.at_step(step, 20)
        rises.append(worker.rise)
    assert rises[:10] == pytest.approx([((i + 1) / 10) ** 2 for i in range(10)])
    assert set(rises[9:]) == {1.0}


def test_the_penalty_makes_vectors_sparse(base, tmp_path):
    folder, sizes = base("ModernBertForMaskedLM", **SMALL), []
    for weight in (0.0, 0.3):
        run = finetune(
            "sparse-embedding", pair_rows(40), output=tmp_path / str(weight), model=folder, query_flops=weight,
            document_flops=weight, flops_warmup=0.3, epochs=4, lr=3e-3, batch_size=8, progress=False,
            keep_best=False,
        )  # fmt: skip
        sizes.append(run.metrics["document_entries"])
        serve = pipeline("sparse-embedding", tmp_path / str(weight), dtype="float32")
        assert len(serve("the cat sat")["indices"])
    assert sizes[1] < 0.8 * sizes[0]
    peers = pytest.importorskip("sentence_transformers")
    theirs = peers.SparseEncoder(str(tmp_path / "0.3"), device="cpu").encode(["the cat sat"]).to_dense().numpy()
    np.testing.assert_allclose(serve.csr(["the cat sat"]).toarray(), theirs, atol=1e-5)


def test_queries_that_were_made_longer_are_seen_in_part_and_documents_whole(base):
    worker, model, examples = prepared("late-interaction", base("ModernBertModel", **SMALL), pair_rows(4))
    queries, documents = ([example.rows[i] for example in examples] for i in (0, 1))
    assert all(len(row) == 32 and row.seen < 32 for row in queries)
    assert all(row.seen == len(row) for row in documents)
    batch = worker.collate(examples, [0] * 4)
    mixed = worker.vectors(model.eval(), batch).split(batch["cu_seqlens"].diff().tolist())
    assert mixed[0].requires_grad
    texts = pair_rows(4)
    for is_query, field in ((True, "anchor"), (False, "positive")):
        expected = worker.serve([row[field] for row in texts], is_query=is_query)
        for i, vectors in enumerate(expected):
            row, ours = (queries if is_query else documents)[i], mixed[2 * i + (not is_query)].detach().numpy()
            np.testing.assert_allclose(ours[np.array(row.kept)], vectors, atol=1e-5)


def test_late_interaction_starts_from_encoders_of_every_kind_and_keeps_their_settings(base, tmp_path):
    rows, common = pair_rows(24), {"max_steps": 3, "batch_size": 8, "progress": False}
    first = finetune("late-interaction", rows, output=tmp_path / "a", model=base("ModernBertModel", **SMALL),
                     dimensions=24, query_length=16, document_length=20, query_prompt="q ", **common)  # fmt: skip
    settings = first.model.settings
    assert (settings.expansion.length, settings.document_length, settings.prompts) == (16, 20, {"query": "q "})
    assert "." in settings.skipped_words
    again = finetune("late-interaction", rows, output=tmp_path / "b", model=tmp_path / "a", expansion="none", **common)
    assert again.model.settings.expansion is None
    assert again.model.settings.query_length == 16
    assert (again.model.width, again.model.settings.document_length) == (24, 20)
    finetune("sentence-embedding", rows, output=tmp_path / "c", model=base("ModernBertModel", **SMALL),
             document_prompt="d ", **common)  # fmt: skip
    third = finetune("late-interaction", rows, output=tmp_path / "d", model=tmp_path / "c", **common)
    assert third.model.settings.prompts == {"document": "d "}
    assert third.pipeline()("the cat").shape[1] == 128
    with pytest.raises(ValueError, match="is a decoder"):
        finetune("late-interaction", rows, output=tmp_path / "e", model=base("ModernBertDecoderForCausalLM"), **common)
    with pytest.raises(InputError, match="query_length is 90; texts have at most 64 tokens"):
        finetune("late-interaction", rows, output=tmp_path / "e", model=tmp_path / "c", query_length=90, **common)


@pytest.mark.parametrize("prompt", ["", "which animal "])
def test_folders_are_read_by_others(prompt, base, tmp_path):
    """By PyLate, too, unless prompts are more than a token."""
    folder = base("ModernBertModel", local_attention=64, **SMALL)  # so that what makes queries longer sees their tokens
    options = {"max_steps": 3, "batch_size": 8, "query_length": 16, "document_length": 40, "query_prompt": prompt}
    run = finetune("late-interaction", pair_rows(24), output=tmp_path / "run", model=folder, progress=False, **options)
    about = json.loads((tmp_path / "run" / "config_sentence_transformers.json").read_text())
    assert about["model_type"] == ("MultiVectorEncoder" if prompt else "ColBERT")
    settings = run.model.settings.prompts
    assert settings == ({"query": prompt} if prompt else {"query": "[unused0]", "document": "[unused1]"})
    peers = pytest.importorskip("sentence_transformers")
    if not hasattr(peers, "MultiVectorEncoder"):
        pytest.skip("sentence-transformers 6 has MultiVectorEncoder")
    theirs, ours = peers.MultiVectorEncoder(str(tmp_path / "run"), device="cpu"), run.pipeline(dtype="float32")
    texts = ["the cat sat", "a dog, then. it ran"]
    for is_query, encode in ((True, theirs.encode_query), (False, theirs.encode_document)):
        for a, b in zip(ours(texts, is_query=is_query), encode(texts, convert_to_numpy=True), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


# Teachers


@pytest.mark.parametrize("task", list(KINDS))
@pytest.mark.usefixtures("one_thread")
def test_a_teacher_scores_once_and_a_killed_run_goes_on_bit_for_bit(task, base, tmp_path, monkeypatch):
    teacher = base("ModernBertForSequenceClassification", num_labels=1, **SMALL)
    folder = base(KINDS[task], **SMALL, mlp_dropout=0.1, **({"num_labels": 1} if task == "text-ranking" else {}))
    rows, said = hard_rows(24, scores=False), []
    (data := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "model": folder, "teacher": str(teacher), "loss": "margin-mse", "max_steps": 8, "batch_size": 6, "lr": 2e-3,
        "micro_tokens": 200, "eval_every": 3, "progress": False, "say": said.append,
    }  # fmt: skip
    finetune(task, data, output=tmp_path / "whole", **options)
    assert sum("the teacher has scored" in line for line in said) == 1
    at_step, calls = TASKS[task].at_step, []

    def struck(self, step, total):
        calls.append(step)
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        return at_step(self, step, total)

    monkeypatch.setattr(TASKS[task], "at_step", struck)
    with pytest.raises(KeyboardInterrupt):
        finetune(task, data, output=tmp_path / "killed", **options)
    monkeypatch.undo()
    shutil.rmtree(teacher)  # it is not asked again
    said.clear()
    finetune(task, output=tmp_path / "killed", resume=True, **{**options, "model": None})
    assert not any("the teacher has scored" in line for line in said)
    for name in ("model.safetensors", "predictions.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_teachers_scores_are_those_of_its_pipeline(base, tmp_path):
    teacher = base("ModernBertForSequenceClassification", num_labels=1, **SMALL)
    rows = hard_rows(4, scores=False)
    finetune("sentence-embedding", rows, output=tmp_path / "run", model=base("ModernBertModel", **SMALL), held_out=0.0,
             teacher=str(teacher), loss="kl", max_steps=1, progress=False)  # fmt: skip
    found = json.loads((tmp_path / "run" / ".teacher.json").read_text())["scores"]
    serve = pipeline("text-ranking", teacher, activation="none", dtype="float32")
    for row, scores in zip(rows, found, strict=True):
        answer = serve(query=row["anchor"], documents=[row["positive"], *row["negatives"]])
        expected = [one["score"] for one in sorted(answer, key=lambda one: one["index"])]
        assert scores == pytest.approx(expected, abs=1e-6)


BAD = {
    "no scores": (hard_rows(8, scores=False), {"loss": "kl"}, "row 1 has no scores; give a column of them"),
    "too few": ([{**row, "scores": [1.0]} for row in hard_rows(8)], {"loss": "kl"}, "give a list of 3 numbers"),
    "words": ([{**row, "scores": "[1, 2, 'x']"} for row in hard_rows(8)], {"loss": "kl"}, "give a list of 3 numbers"),
    "no negatives": (pair_rows(8), {"loss": "margin-mse"}, "row 1 has no negatives"),
    "teacher alone": (hard_rows(8), {"teacher": "x"}, "teacher is given, and loss is contrastive; give loss margin"),
    "no such teacher": (hard_rows(8), {"teacher": "/no/teacher", "loss": "kl"}, "/no/teacher"),
    "columns": ([{"a": "x", "b": "y"}], {}, "none is known to hold the anchor"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_rows_that_cannot_be_learned_are_one_error(case, base, tmp_path):
    rows, options, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        finetune("late-interaction", rows, output=tmp_path / "run", model=base("ModernBertModel", **SMALL),
                 progress=False, held_out=0.0, **options)  # fmt: skip
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()
    labelled = [{**row, "label": 1, "scores": [1.0, 0.0]} for row in ranking_rows(4)]
    with pytest.raises(InputError, match="loss is kl, and the rows have labels"):
        finetune("text-ranking", labelled, output=tmp_path / "run", model=base("ModernBertForSequenceClassification"),
                 progress=False, loss="kl")  # fmt: skip


@pytest.mark.parametrize("task", ["late-interaction", pytest.param("sparse-embedding", marks=pytest.mark.slow)])
def test_two_processes_learn_a_teachers_scores_as_one(task, base, tmp_path):
    teacher = base("ModernBertForSequenceClassification", num_labels=1, **SMALL)
    (data := tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hard_rows(16, 1, False)))
    options = {"model": base(KINDS[task], **SMALL), "loss": "margin-mse", "max_steps": 4, "batch_size": 6, "lr": 2e-3}
    options |= {"teacher": str(teacher), "precision": "float32", "device": "cpu", "held_out": 0.0}
    options |= {"query_flops": 0.0, "document_flops": 0.0} if task == "sparse-embedding" else {}
    finetune(task, data, output=tmp_path / "one", progress=False, **options)
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    command = ["finetune", task, *flags, "--train", data, "--output", tmp_path / "two"]
    finish([*TWO_PROCESSES, "modernbert"], *command)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert_close_by_name(two, one, 1e-4)
