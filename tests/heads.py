"""The classes of the encoder, by their heads, and those of the decoder."""

HEADS = {
    "Model": "ModernBertModel",
    "MaskedLM": "ModernBertForMaskedLM",
    "SequenceClassification": "ModernBertForSequenceClassification",
    "TokenClassification": "ModernBertForTokenClassification",
    "QuestionAnswering": "ModernBertForQuestionAnswering",
    "MultipleChoice": "ModernBertForMultipleChoice",
}

DECODER_HEADS = {
    "DecoderModel": "ModernBertDecoderModel",
    "CausalLM": "ModernBertDecoderForCausalLM",
    "DecoderSequenceClassification": "ModernBertDecoderForSequenceClassification",
}

CLASSES = [*HEADS.values(), *DECODER_HEADS.values()]
