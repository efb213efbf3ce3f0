"""Train a byte-level BPE tokenizer with ModernBERT's special tokens and template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from modernbert.io.files import write_text

SPECIALS = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
_UNUSED = 11  # spare ids for users' own tokens; they round the usual sizes up to a multiple of 16


def train_tokenizer(documents: Iterable[str], vocab_size: int = 8192) -> Tokenizer:
    """Train a tokenizer of `vocab_size` ids: byte pairs first, then the special tokens, then spare ones.

    Args:
        documents: raw text.
        vocab_size: number of ids in all; at least the 256 bytes, the special and the spare tokens.

    Returns:
        A tokenizer that normalises to NFC, splits as GPT-2 did, and wraps texts as `[CLS] A [SEP] (B [SEP])`.

    Raises:
        ValueError: the vocabulary is too small to hold the bytes.
    """
    least = 256 + len(SPECIALS) + _UNUSED
    if vocab_size < least:
        raise ValueError(f"vocab_size is {vocab_size}; bytes, special and spare tokens need at least {least}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS) - _UNUSED,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    learned = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, lstrip=t == "[MASK]") for t in SPECIALS]
    )
    tokenizer.add_tokens([AddedToken(f"[unused{i}]", special=False) for i in range(_UNUSED)])
    ids = {token: learned + i for i, token in enumerate(SPECIALS)}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:0 [SEP]",
        special_tokens=[(t, ids[t]) for t in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, which transformers reads too."""
    folder = Path(folder)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=False))
    config = {
        "clean_up_tokenization_spaces": False,
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "pad_token": "[PAD]",
        "sep_token": "[SEP]",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "[UNK]",
    }
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
