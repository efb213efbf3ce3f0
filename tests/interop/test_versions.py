"""What we save, loaded by other versions of the libraries around us, and what they save, loaded here: the same numbers.

Each cell of `VERSIONS` is a test; the code of a column runs once, in an environment of its own. docs/compatibility.md
shows this table.
"""

import functools
import json

import numpy as np
import pytest
import torch

import modernbert
from modernbert.models.sentence_encoder import Dense, Normalize
from modernbert.models.sentence_layout import EmbeddingSettings
from modernbert.pipelines import small_model
from tests.interop.environments import ENVIRONMENTS, run_in

pytestmark = pytest.mark.slow
TEXTS = ["The capital of France is Paris.", "Rivers flow.", "A longer sentence, with commas and so on, for the batch."]
QUERY = "Which city is the capital of France?"
LABELS = {"num_labels": 3}
# Heads, and the version of transformers that first had each.
HEADS = {
    "ModernBertModel": (4, 48),
    "ModernBertForMaskedLM": (4, 48),
    "ModernBertForSequenceClassification": (4, 48),
    "ModernBertForTokenClassification": (4, 48),
    "ModernBertForQuestionAnswering": (4, 50),
    "ModernBertForMultipleChoice": (4, 56),
    "ModernBertDecoderModel": (4, 54),
    "ModernBertDecoderForCausalLM": (4, 54),
    "ModernBertDecoderForSequenceClassification": (4, 54),
}
ADAPTED = ("ModernBertForSequenceClassification", "ModernBertDecoderForCausalLM")
OTHERS = ("tokenizer", "sentence encoder", "cross-encoder", *(f"adapter of {name}" for name in ADAPTED))
OF_TRANSFORMERS = (*HEADS, "tokenizer")
WHAT = {
    **dict.fromkeys(("transformers-4.48", "transformers-4.57", "installed", "transformers-5"), OF_TRANSFORMERS),
    **dict.fromkeys([name for name in ENVIRONMENTS if name.startswith("sentence-")], OTHERS[1:3]),
    **dict.fromkeys(("peft-0.14", "transformers-4.57"), OTHERS[3:]),
}
WHAT["transformers-4.57"] = (*OF_TRANSFORMERS, *OTHERS[3:])
WHAT["installed"] = (*OF_TRANSFORMERS, *OTHERS[1:])
CELLS = [(name, what) for name, all_of_them in WHAT.items() for what in all_of_them]

# Runs there: loads everything of ours, says what it gives, and saves it again.
CODE = """
import json, sys, warnings
from pathlib import Path
import numpy as np, torch, transformers
warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
folder, theirs, wanted = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
TEXTS, QUERY, heads = wanted["texts"], wanted["query"], wanted["heads"]
batch = {k: torch.from_numpy(v) for k, v in np.load(folder / "batch.npz").items()}
found, report = {}, {"transformers": transformers.__version__}
def answer(model, name):
    ids = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, model.config.pad_token_id)
    given = {**batch, "input_ids": ids}
    given = {k: v[:, None].repeat(1, 2, 1) for k, v in given.items()} if "Choice" in name else given
    with torch.no_grad():
        out = model.eval()(**given)
    return (out.start_logits if "Question" in name else out[0]).float().numpy()
def load(name, where):
    cls = getattr(transformers, name)
    model, info = cls.from_pretrained(where, output_loading_info=True, attn_implementation="eager")
    wrong = {k: sorted(map(str, v)) for k, v in info.items() if v}
    assert not wrong, (name, wrong)
    return model
for name in wanted["what"]:
    if name in heads and hasattr(transformers, name):
        model = load(name, folder / name)
        found[name] = answer(model, name)
        model.save_pretrained(theirs / name)
    elif name == "tokenizer":
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "ModernBertModel")
        report["tokenizer"] = {
            "ids": tokenizer(TEXTS, [QUERY] * 3)["input_ids"], "text": tokenizer.decode(tokenizer(QUERY)["input_ids"]),
            "length": tokenizer.model_max_length, "mask": tokenizer.mask_token_id,
            "names": sorted(tokenizer(TEXTS[0])), "class": type(tokenizer).__name__,
        }
        tokenizer.save_pretrained(theirs / "tokenizer")
    elif name in ("sentence encoder", "cross-encoder"):
        import sentence_transformers
        report["sentence-transformers"] = sentence_transformers.__version__
        if name == "sentence encoder":
            model = sentence_transformers.SentenceTransformer(str(folder / name), device="cpu")
            found[name] = model.encode(TEXTS)
        else:
            model = sentence_transformers.CrossEncoder(str(folder / name), device="cpu")
            found[name] = model.predict([(QUERY, text) for text in TEXTS])
        model.save_pretrained(str(theirs / name))
    elif name.startswith("adapter of "):
        import peft
        report["peft"] = peft.__version__
        cls = name.removeprefix("adapter of ")
        if not hasattr(transformers, cls):
            continue
        model = load(cls, folder / cls)
        adapted = peft.PeftModel.from_pretrained(model, folder / name)
        found[name] = answer(adapted, cls)
        torch.manual_seed(5)
        targets = ["q_proj", "Wo"] if "Decoder" in cls else ["Wqkv", "Wo"]
        more = {"modules_to_save": ["classifier"]} if "Class" in cls else {}
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, use_dora=True, **more)
        own = peft.get_peft_model(load(cls, folder / cls), config)
        own.save_pretrained(theirs / name)
        found["their " + name] = answer(own, cls)
np.savez(theirs / "found.npz", **found)
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Everything that we save, in a folder, and what it gives."""
    from modernbert.training.adapters import add_adapters

    folder, given = tmp_path_factory.mktemp("ours"), {}
    for name in HEADS:
        base = small_model("decoder" if "Decoder" in name else "encoder")
        more = LABELS if "Classification" in name else {}
        torch.manual_seed(0)
        model = getattr(modernbert, name).from_pretrained(base, dtype="float32", **more)
        tokenizer = modernbert.AutoTokenizer.from_pretrained(base)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        if name == "ModernBertModel":
            batch = tokenizer(TEXTS, padding=True, return_tensors="np")
            np.savez(folder / "batch.npz", **{k: batch[k] for k in ("input_ids", "attention_mask")})
        given[name] = answer(model, name, folder)
        if name in ADAPTED:
            what = f"adapter of {name}"
            adapted = add_adapters(getattr(modernbert, name).from_pretrained(folder / name), 4, None)
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter) * 0.05)
            adapted.save_pretrained(folder / what)
            given[what] = answer(adapted.eval(), name, folder)
    tokenizer = modernbert.AutoTokenizer.from_pretrained(small_model())
    model = modernbert.ModernBertModel.from_pretrained(small_model(), dtype="float32")
    prompts = {"query": "search: ", "document": ""}
    settings = EmbeddingSettings(("cls", "mean"), prompts=prompts, default_prompt_name="query", max_length=12)
    dense = Dense(2 * model.config.hidden_size, 16)
    encoder = modernbert.SentenceEncoder(model, settings, after_pooling=[dense, Normalize()])
    encoder.save_pretrained(folder / "sentence encoder")
    cross = modernbert.ModernBertForSequenceClassification.from_pretrained(small_model(), dtype="float32", num_labels=1)
    cross.save_pretrained(folder / "cross-encoder")
    for what in ("sentence encoder", "cross-encoder"):
        tokenizer.save_pretrained(folder / what)
        given[what] = serve(what, folder / what)
    return folder, given


@torch.no_grad()
def answer(model, name, folder):
    batch = {k: torch.from_numpy(v) for k, v in np.load(folder / "batch.npz").items()}
    if "Choice" in name:
        batch = {k: v[:, None].repeat(1, 2, 1) for k, v in batch.items()}
    out = model(**batch)
    return (out.start_logits if "Question" in name else out[0]).numpy()


def serve(what, folder):
    if what == "sentence encoder":
        return modernbert.pipeline("sentence-embedding", folder, dtype="float32")(TEXTS)
    ranked = modernbert.pipeline("text-ranking", folder, dtype="float32")(QUERY, TEXTS)
    return np.array([one["score"] for one in sorted(ranked, key=lambda one: one["index"])])


@pytest.fixture(scope="module")
def there(ours, tmp_path_factory):
    """What a column's libraries say of our folders, and the folder of what they saved."""

    @functools.cache
    def run(environment):
        theirs = tmp_path_factory.mktemp(environment)
        wanted = {"texts": TEXTS, "query": QUERY, "heads": list(HEADS), "what": WHAT[environment]}
        printed = run_in(environment, CODE, ours[0], theirs, json.dumps(wanted), timeout=900)
        report = json.loads(printed.strip().splitlines()[-1])
        print(environment, {name: value for name, value in report.items() if name != "tokenizer"})
        return dict(np.load(theirs / "found.npz")), report, theirs

    return run


def close(one, other, what, folder):
    """The same numbers at real tokens."""
    if "Model" in what or "LM" in what or "Token" in what or "Question" in what:
        real = np.load(folder / "batch.npz")["attention_mask"].astype(bool)
        one, other = one[real], other[real]
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * max(1, np.abs(other).max()))


@pytest.mark.parametrize(("environment", "what"), CELLS)
def test_what_one_saves_the_other_loads(environment, what, ours, there):
    folder, given = ours
    found, report, theirs = there(environment)
    if what == "tokenizer":
        for where in (folder / "ModernBertModel", theirs / "tokenizer"):
            tokenizer = modernbert.AutoTokenizer.from_pretrained(where)
            assert tokenizer(TEXTS, [QUERY] * 3)["input_ids"] == report["tokenizer"]["ids"]
            assert tokenizer.decode(tokenizer(QUERY)["input_ids"]) == report["tokenizer"]["text"]
            assert tokenizer.model_max_length == report["tokenizer"]["length"]
            assert tokenizer.mask_token_id == report["tokenizer"]["mask"]
            assert sorted(tokenizer(TEXTS[0])) == report["tokenizer"]["names"]
        return
    head = what.removeprefix("adapter of ")
    if head in HEADS and tuple(map(int, report["transformers"].split(".")[:2])) < HEADS[head]:
        assert what not in found
        pytest.skip(f"transformers {report['transformers']} has no {head}")
    close(found[what], given[what], what, folder)
    if what.startswith("adapter of "):
        for where, wanted in ((folder / what, found[what]), (theirs / what, found[f"their {what}"])):
            close(answer(modernbert.auto.load_as_saved(where), head, folder), wanted, head, folder)
    elif what in HEADS:
        again = getattr(modernbert, what).from_pretrained(theirs / what)
        close(answer(again, what, folder), given[what], what, folder)
    else:
        close(serve(what, theirs / what), given[what], what, folder)
