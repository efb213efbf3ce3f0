"""Training: text, masking, batches, optimizers, a run that learns, stops, and goes on as if it had not."""

import dataclasses
import inspect
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from modernbert import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, ModernBertForMaskedLM
from modernbert.cli import main
from modernbert.cli.train import pretrain as pretrain_command
from modernbert.errors import DivergedError, InputError
from modernbert.training.data import Corpus, batch_order, token_batches
from modernbert.training.objectives import CausalLM, MaskedLM, make_objective
from modernbert.training.pretrain import (
    PretrainOptions,
    new_model,
    pretrain,
)
from modernbert.training.text import iter_documents, pieces, split_documents
from modernbert.training.train_tokenizer import SPECIALS, train_tokenizer
from tests.finetuning.conftest import WORDS


def story(rng, sentences):
    return " ".join(" ".join(rng.choices(WORDS, k=rng.randint(3, 9))).capitalize() + "." for _ in range(sentences))


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(0)
    return [story(rng, rng.randint(1, 60)) for _ in range(80)]


@pytest.fixture(scope="module")
def tokenizer(documents):
    return train_tokenizer(documents, 320)


@given(st.text(alphabet="ab c.!?\n\"' ", max_size=300), st.integers(3, 40), st.integers(0, 99))
def test_pieces_lose_nothing(text, max_tokens, seed):
    cut = list(pieces(text, max_tokens, random.Random(seed)))
    assert "".join("".join(cut).split()) == "".join(text.split())
    assert all(piece.strip() == piece and piece for piece in cut)


def test_documents_of_files_and_what_is_held_out(tmp_path, documents):
    (tmp_path / "sub").mkdir()
    for i in range(20):
        (tmp_path / "sub" / f"{i:02}.txt").write_text(documents[i])
    lines = [json.dumps({"text": d, "other": 1}) for d in documents[20:70]]
    (tmp_path / "more.jsonl").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "ignored.csv").write_text("a,b")
    assert sorted(d.text for d in iter_documents([tmp_path])) == sorted(documents[:70])
    train, kept = split_documents([tmp_path], 0.1)
    assert (len(train), len(kept)) == (63, 7)
    assert set(train) | set(kept) == set(documents[:70])
    assert sum(d in documents[:20] for d in kept) == 2  # the same share of each source
    assert split_documents([tmp_path], 0.1) == (train, kept)
    assert split_documents([tmp_path], 0.0)[1] == []
    with pytest.raises(InputError, match="lie in"):
        split_documents([tmp_path], 1.0)


def test_bad_paths_and_lines_are_named(tmp_path):
    with pytest.raises(InputError, match="no file or folder"):
        list(iter_documents([tmp_path / "missing"]))
    with pytest.raises(InputError, match=r"holds no \.txt or \.jsonl"):
        list(iter_documents([tmp_path]))
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(InputError, match=r"neither \.txt nor \.jsonl"):
        list(iter_documents([tmp_path / "a.csv"]))
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"txt": "not"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 2"):
        list(iter_documents([tmp_path / "a.jsonl"]))


def test_the_tokenizer_has_modernberts_tokens_and_template(tokenizer):
    assert tokenizer.get_vocab_size() == 320
    assert [tokenizer.id_to_token(320 - 16 + i) for i in range(5)] == list(SPECIALS)
    assert tokenizer.encode("the cat", "a dog").tokens[0] == "[CLS]"
    assert tokenizer.encode("the cat", "a dog").tokens.count("[SEP]") == 2
    assert tokenizer.decode(tokenizer.encode("naïve 👍 the cat").ids) == "naïve 👍 the cat"
    masked = tokenizer.encode("the [MASK]").ids
    assert masked == [
        *tokenizer.encode("the").ids[:-1],
        tokenizer.token_to_id("[MASK]"),
        masked[-1],
    ]  # it takes the space
    with pytest.raises(ValueError, match="vocab_size is 100"):
        train_tokenizer(["x"], 100)


def test_a_corpus_holds_every_token_in_texts_that_fit(documents, tokenizer):
    corpus = Corpus.from_documents(documents, tokenizer, 24, seed=0)
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    assert corpus.lengths.max() <= 24
    texts = [corpus.tokens[a:b] for a, b in zip(corpus.starts, corpus.starts[1:], strict=False)]
    assert all(t[0] == cls and t[-1] == sep for t in texts)
    text = "".join(tokenizer.decode(list(t[1:-1])) for t in texts)
    assert "".join(text.split()) == "".join("".join(documents).split())
    assert len(Corpus.from_documents([], tokenizer, 24, 0)) == 0


def test_masking(tokenizer):
    masking = MaskedLM(tokenizer, 0.3)
    special = torch.tensor(list(masking.special_ids.values()))
    ids = torch.randint(0, 320, (20_000,))
    masked, labels = masking(ids, torch.Generator().manual_seed(0))
    hidden = labels != -100
    assert abs(hidden.float().mean() - 0.3 * (320 - len(special)) / 320) < 0.01
    assert (masked[hidden] == tokenizer.token_to_id("[MASK]")).all()
    assert torch.equal(labels[hidden], ids[hidden])
    assert torch.equal(masked[~hidden], ids[~hidden])
    assert not torch.isin(ids[hidden], special).any()


def test_a_causal_model_says_all_tokens_but_the_first(tokenizer):
    objective = CausalLM(tokenizer)
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    ids = torch.tensor([cls, 5, 6, sep, cls, 7, sep])
    read, labels = objective(ids, torch.Generator())
    assert torch.equal(read, ids)
    assert labels.tolist() == [-100, 5, 6, sep, -100, 7, sep]
    inputs = small(tokenizer, objective="clm").model.pack_inputs(ids, None, cu_seqlens=torch.tensor([0, 4, 7]))
    assert objective.targets(inputs, labels).tolist() == [5, 6, sep, -100, 7, sep, -100]
    assert objective.finish_tokenizer(tokenizer).encode("a").ids == [cls, *tokenizer.encode("a").ids[1:-1]]
    assert tokenizer.encode("a").ids[-1] == sep
    with pytest.raises(InputError, match="objective is 'rtd'; choose one of mlm, clm"):
        make_objective("rtd", tokenizer, 0.3)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 120), st.integers(0, 5))
def test_every_text_is_in_one_batch_of_an_epoch_within_the_budget(lengths, budget, seed):
    array = np.array(lengths)
    batches = batch_order(array, budget, seed)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert all(array[b].sum() <= budget or len(b) == 1 for b in batches)


def test_batches_go_on_where_they_stopped(documents, tokenizer):
    corpus = Corpus.from_documents(documents, tokenizer, 24, seed=0)
    masking = MaskedLM(tokenizer, 0.3)
    stream = token_batches(corpus, masking, 200, seed=3)
    first = [next(stream) for _ in range(30)]
    again = token_batches(corpus, masking, 200, seed=3, start=17)
    for a in first[17:]:
        b = next(again)
        assert a.number == b.number
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.cu_seqlens, b.cu_seqlens)
    assert a.cu_seqlens[-1] == len(a.input_ids)
    other = next(token_batches(corpus, masking, 200, seed=4))
    assert not torch.equal(other.input_ids, first[0].input_ids)
    with pytest.raises(ValueError, match="no text"):
        next(token_batches(Corpus.from_documents([], tokenizer, 24, 0), masking, 10, 0))


def small(tokenizer, objective="mlm", **changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    changes = {**sizes, "max_position_embeddings": 64, "initializer_range": 0.1, **changes}
    return new_model(tokenizer, changes, objective=objective)


@pytest.mark.parametrize(("optimizer", "objective"), [("stableadamw", "mlm"), ("muon", "mlm"), ("muon", "clm")])
def test_a_run_learns_and_goes_on_as_if_it_had_not_stopped(optimizer, objective, documents, tokenizer, tmp_path):
    train = Corpus.from_documents(documents[:70], tokenizer, 32, 0)
    held = Corpus.from_documents(documents[70:], tokenizer, 32, 0)
    options = PretrainOptions(
        objective=objective,
        steps=30,
        tokens_per_step=512,
        micro_tokens=256,
        optimizer=optimizer,
        lr=5e-3,
        eval_every=10,
        save_every=10,
    )
    seen = []
    whole = pretrain(
        small(tokenizer, objective), train, held, tmp_path / "whole", options, tokenizer=tokenizer, report=seen.append
    )
    assert [p.step for p in seen] == list(range(1, 31))
    assert seen[-1].val_loss < seen[0].loss - 0.5
    assert [p.step for p in seen if p.val_loss is not None] == [10, 20, 30]
    rows = [json.loads(x) for x in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == list(range(1, 31))
    assert not getattr(whole.config, "sparse_prediction", False)

    class Stopped(Exception):
        pass

    def stop(progress):
        if progress.step == 25:
            raise Stopped

    with pytest.raises(Stopped):
        pretrain(small(tokenizer, objective), train, held, tmp_path / "cut", options, tokenizer=tokenizer, report=stop)
    assert [p.name for p in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-20"]
    with pytest.raises(InputError, match="resume it or choose another folder"):
        pretrain(small(tokenizer, objective), train, held, tmp_path / "cut", options, tokenizer=tokenizer)
    name = "mask_rate" if objective == "mlm" else "seed"
    other = dataclasses.replace(options, **{name: 0.2 if objective == "mlm" else 1})
    with pytest.raises(InputError, match=f"{name} is .* and the run in"):
        pretrain(small(tokenizer, objective), train, held, tmp_path / "cut", other, tokenizer=tokenizer, resume=True)
    auto = AutoModelForMaskedLM if objective == "mlm" else AutoModelForCausalLM
    config = auto.from_pretrained(tmp_path / "cut" / "checkpoint-20").config
    assert not getattr(config, "sparse_prediction", False)
    with pytest.raises(InputError, match="trains Modern"):
        pretrain(
            small(tokenizer, "clm" if objective == "mlm" else "mlm"),
            train,
            held,
            tmp_path / "x",
            options,
            tokenizer=tokenizer,
        )
    cut = pretrain(
        small(tokenizer, objective), train, held, tmp_path / "cut", options, tokenizer=tokenizer, resume=True
    )
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)
    assert auto.from_pretrained(tmp_path / "cut").num_parameters() == cut.num_parameters()
    saved = AutoTokenizer.from_pretrained(tmp_path / "cut")
    assert saved.mask_token == "[MASK]"
    assert (saved("a").input_ids[-1] == saved.sep_token_id) == (objective == "mlm")
    with pytest.raises(InputError, match="no checkpoint to resume"):
        pretrain(small(tokenizer, objective), train, held, tmp_path / "none", options, tokenizer=tokenizer, resume=True)


def test_passes_of_any_size_weigh_every_label_once(documents, tokenizer, tmp_path):
    """The same batch in one pass and in several gives the same gradient, however the labels fall."""
    corpus = Corpus.from_documents(documents, tokenizer, 32, 0)
    model = small(tokenizer)
    masking = MaskedLM(tokenizer, 0.3)
    stream = token_batches(corpus, masking, 128, 0)
    micro = [next(stream) for _ in range(4)]
    labels = sum(int((b.labels != -100).sum()) for b in micro)
    for b in micro:
        model(b.input_ids, cu_seqlens=b.cu_seqlens, labels=b.labels, num_items_in_batch=labels).loss.backward()
    parts = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    lengths = torch.cat([b.cu_seqlens.diff() for b in micro])
    starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    ids, truth = torch.cat([b.input_ids for b in micro]), torch.cat([b.labels for b in micro])
    model(ids, cu_seqlens=starts, labels=truth).loss.backward()
    for a, p in zip(parts, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-6)


def test_texts_of_a_batch_do_not_see_each_other(documents, tokenizer):
    corpus = Corpus.from_documents(documents, tokenizer, 32, 0)
    batch = next(token_batches(corpus, MaskedLM(tokenizer, 0.3), 300, 0))
    model = small(tokenizer).eval()
    end = int(batch.cu_seqlens[1])
    together = model(batch.input_ids, cu_seqlens=batch.cu_seqlens).logits[:end]
    assert torch.equal(model(batch.input_ids[None, :end]).logits[0], together)


def test_evaluation_counts_what_is_right(documents, tokenizer):
    """A model that always gives one token is right as often as that token is hidden."""
    corpus = Corpus.from_documents(documents, tokenizer, 32, 0)
    model = small(tokenizer)
    token = int(np.bincount(corpus.tokens).argsort()[-3])
    with torch.no_grad():
        model.decoder.weight.zero_()
        model.decoder.bias.zero_()
        model.decoder.bias[token] = 50.0
    model.train()
    objective = MaskedLM(tokenizer, 0.15)
    score = objective.evaluate(model, corpus, seed=1)
    words = corpus.tokens[~np.isin(corpus.tokens, list(objective.special_ids.values()))]
    assert abs(score.top1 - (words == token).mean()) < 0.03
    assert score.top5 >= score.top1
    assert abs(score.tokens / len(words) - 0.15) < 0.02
    assert model.training
    with pytest.raises(InputError, match="too short"):
        MaskedLM(tokenizer, 0.001).evaluate(model, Corpus.from_documents(["a"], tokenizer, 8, 0))
    # A decoder is right whenever the token comes next, and its loss is the forward pass's own.
    decoder = small(tokenizer, "clm")
    score = CausalLM(tokenizer).evaluate(decoder.eval(), corpus)
    starts = torch.from_numpy(corpus.starts).int()
    ids = torch.from_numpy(corpus.tokens).long()
    loss = decoder(ids, cu_seqlens=starts, labels=ids).loss.item()
    assert score.tokens == len(ids) - len(corpus)
    assert abs(score.loss - loss) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mask_rate": 0}, "mask_rate"), ({"steps": 0}, "steps is 0"), ({"micro_tokens": 5}, "no multiple"),
     ({"warmup": 0.7, "decay": 0.7}, "shares of the"),
     ({"save_dtype": "int8"}, "save_dtype is 'int8'"),
     ({"optimizer": "sgd"}, "choose one of adamw, stableadamw, muon"), ({"dtype": "int8"}, "dtype is 'int8'")],
)  # fmt: skip
def test_impossible_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PretrainOptions(**options)


def test_the_command_has_the_options_defaults():
    command = {name: p.default for name, p in inspect.signature(pretrain_command).parameters.items()}
    for field in dataclasses.fields(PretrainOptions):
        assert command[field.name] == field.default, field.name


def test_a_diverged_loss_ends_the_run(documents, tokenizer, tmp_path):
    corpus = Corpus.from_documents(documents, tokenizer, 32, 0)
    model = small(tokenizer)
    with torch.no_grad():
        model.decoder.bias.fill_(float("nan"))
    options = PretrainOptions(steps=1, tokens_per_step=256, micro_tokens=256)
    with pytest.raises(DivergedError, match="lower the learning rate"):
        pretrain(model, corpus, None, tmp_path, options, tokenizer=tokenizer)


def test_bfloat16_autocast_trains(documents, tokenizer, tmp_path):
    corpus = Corpus.from_documents(documents, tokenizer, 32, 0)
    options = PretrainOptions(steps=3, tokens_per_step=256, micro_tokens=256, dtype="bfloat16")
    model = pretrain(small(tokenizer), corpus, None, tmp_path, options, tokenizer=tokenizer)
    assert model.dtype == torch.float32
    assert isinstance(model, ModernBertForMaskedLM)


def test_from_text_to_a_filled_mask_by_commands(documents, tmp_path, capsys):
    """train-tokenizer, pretrain, evaluate and run, one after another."""
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": d}) for d in documents))

    def command(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        assert not end.value.code, capsys.readouterr().err
        return capsys.readouterr()

    said = command("train-tokenizer", data, "--output", tmp_path / "tok", "--vocab-size", 320, "--max-length", 64)
    assert "320 ids" in said.err
    sizes = ["--hidden-size", 32, "--intermediate-size", 48, "--layers", 2, "--heads", 2, "--max-length", 64]
    said = command(
        "pretrain", data, "--tokenizer", tmp_path / "tok", "--output", tmp_path / "run", *sizes, "--steps", 60,
        "--tokens-per-step", 512, "--micro-tokens", 512, "--held-out", 0.1, "--eval-every", 30,
        "--initializer-range", 0.1, "--save-dtype", "float16",
    )  # fmt: skip
    assert "tokens/s" in said.err
    assert "min left" in said.err
    assert "held out: loss" in said.err
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float16}
    score = json.loads(command("evaluate", tmp_path / "run", data, "--held-out", 0.1).out)
    assert set(score) == {"documents", "masked_tokens", "loss", "top1", "top5"}
    assert score["documents"] == 8
    assert score["top1"] > 0.05
    answer = json.loads(command("run", "--model", tmp_path / "run", "--json", "The [MASK] sat.").out)
    assert len(answer["output"]) == 5
    said = command(
        "pretrain", data, "--tokenizer", tmp_path / "tok", "--output", tmp_path / "decoder", "--objective", "clm",
        *sizes, "--steps", 60, "--tokens-per-step", 512, "--micro-tokens", 512, "--held-out", 0.1,
        "--initializer-range", 0.1,
    )  # fmt: skip
    score = json.loads(command("evaluate", tmp_path / "decoder", data, "--held-out", 0.1).out)
    assert set(score) == {"documents", "tokens", "loss", "top1", "top5", "perplexity", "bits_per_byte"}
    assert score["perplexity"] < 150
    said = command("run", "--model", tmp_path / "decoder", "--max-new-tokens", 5, "The cat")
    assert said.out.startswith("The cat")
    with pytest.raises(SystemExit) as end:
        main(["pretrain", str(data), "--tokenizer", str(tmp_path / "tok"), "--output", "x", "--objective", "rtd"])
    assert end.value.code == 2
    assert "objective is 'rtd'" in capsys.readouterr().err
