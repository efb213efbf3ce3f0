"""Small models with tokenizers, and rows to train them on."""

import random

import pytest
import torch

import modernbert
from modernbert import ModernBertConfig, ModernBertDecoderConfig, Tokenizer
from modernbert.training.pretraining.train_tokenizer import train_tokenizer

WORDS = (
    "the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "over", "under", "mat", "hill", "tree", "and", "then",
    "it", "was", "happy", "sad",
)  # fmt: skip
MOODS = ("happy", "sad", "calm")


def sentence(rng, least=2, most=14):
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def mood_rows(count=48, seed=0):
    """Texts whose last word is their label."""
    rng = random.Random(seed)
    return [{"text": f"{sentence(rng)} {mood}", "label": mood} for mood in rng.choices(MOODS, k=count)]


def tag_rows(count=40, seed=0):
    rng = random.Random(seed)
    rows = [sentence(rng).split() for _ in range(count)]
    tags = [["B-animal" if word in ("cat", "dog", "bird") else "O" for word in words] for words in rows]
    return [{"tokens": words, "tags": tag} for words, tag in zip(rows, tags, strict=True)]


def answer_rows(count=40, seed=0):
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        before, animal, behind = sentence(rng, 1, 30), rng.choice(["cat", "dog", "bird"]), sentence(rng, 1, 9)
        answers = [{"text": animal, "answer_start": len(before) + 1}]
        context = f"{before} {animal} {behind}"
        rows.append({"id": str(i), "question": "which animal", "context": context, "answers": answers})
    return rows


def choice_rows(count=30, seed=0):
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        choices = [sentence(rng, 1, 6) for _ in range(rng.randint(2, 4))]
        rows.append({"prompt": sentence(rng), "choices": choices, "label": rng.randrange(len(choices))})
    return rows


def pair_rows(count=40, seed=0):
    rng = random.Random(seed)
    return [{"anchor": f"q {text}", "positive": text} for text in (sentence(rng, 3, 12) for _ in range(count))]


def ranking_rows(count=40, seed=0):
    return [{"query": row["anchor"], "document": row["positive"]} for row in pair_rows(count, seed)]


def text_rows(count=12, seed=0):
    rng = random.Random(seed)
    return [{"text": ". ".join(sentence(rng).capitalize() for _ in range(12)) + "."} for _ in range(count)]


@pytest.fixture(scope="session")
def backend():
    return train_tokenizer([row["text"] for row in text_rows(60)] + ["which animal q calm"] * 20, 320)


@pytest.fixture(scope="session")
def base(tmp_path_factory, backend):
    """Makes a folder with a random model of a class and its tokenizer."""

    def make(kind="ModernBertForMaskedLM", **changes):
        ids = {name: backend.token_to_id(f"[{name.upper()}]") for name in ("cls", "sep", "pad")}
        sizes = {
            "vocab_size": 320, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 3, "local_attention": 16, "max_position_embeddings": 64, "initializer_range": 0.1,
            "pad_token_id": ids["pad"], "bos_token_id": ids["cls"], "cls_token_id": ids["cls"],
            "eos_token_id": ids["sep"], "sep_token_id": ids["sep"],
        }  # fmt: skip
        torch.manual_seed(3)
        config = ModernBertDecoderConfig if "Decoder" in kind else ModernBertConfig
        folder = tmp_path_factory.mktemp("base")
        getattr(modernbert, kind)(config(**{**sizes, **changes})).save_pretrained(folder)
        Tokenizer(backend, {"model_max_length": 64}).save_pretrained(folder)
        return folder

    return make


# A task, rows that suit it, and its class of model with what the configuration needs.
TASK_ROWS = {
    "text-classification": (mood_rows, "ModernBertForSequenceClassification", {"num_labels": 3}),
    "token-classification": (tag_rows, "ModernBertForTokenClassification", {"num_labels": 2}),
    "question-answering": (answer_rows, "ModernBertForQuestionAnswering", {"num_labels": 2}),
    "multiple-choice": (choice_rows, "ModernBertForMultipleChoice", {}),
    "masked-lm": (text_rows, "ModernBertForMaskedLM", {}),
    "causal-lm": (text_rows, "ModernBertDecoderForCausalLM", {}),
    "sentence-embedding": (pair_rows, "ModernBertModel", {}),
    "text-ranking": (ranking_rows, "ModernBertForSequenceClassification", {"num_labels": 1}),
    "late-interaction": (pair_rows, "ModernBertModel", {}),
    "sparse-embedding": (pair_rows, "ModernBertForMaskedLM", {}),
}
