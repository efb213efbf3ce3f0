"""Training: text, tokenizer, masking, optimizer and the loop of pretraining."""
