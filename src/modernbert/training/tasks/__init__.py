"""The tasks of fine-tuning: rows become examples, examples labels, outputs metrics."""
