"""Text in, token ids out: the tokenizer and its encodings."""
