"""Rows with labels for each class, alone and as a batch."""

import torch


def row_of(name, seed=0, tokens=10):
    """One example of a class of models, as datasets hand it to collators."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 96, (tokens,), generator=generator)
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "QuestionAnswering" in name:
        return {**row, "start_positions": torch.tensor(2), "end_positions": torch.tensor(4)}
    if "SequenceClassification" in name:
        return {**row, "labels": torch.tensor(seed % 2)}
    if "TokenClassification" in name:
        return {**row, "labels": ids % 2}
    if "MultipleChoice" in name:
        choices = {"input_ids": torch.stack([ids, ids.flip(0), ids.roll(3)]), "attention_mask": torch.ones(3, tokens)}
        return {**choices, "labels": torch.tensor(seed % 3)}
    return {**row, "labels": ids} if "For" in name else row


def batch_of(name, size=2, tokens=10):
    rows = [row_of(name, seed, tokens) for seed in range(size)]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
