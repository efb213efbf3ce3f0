"""The classes of the encoder, by their heads."""

HEADS = {
    "Model": "ModernBertModel",
    "MaskedLM": "ModernBertForMaskedLM",
    "SequenceClassification": "ModernBertForSequenceClassification",
    "TokenClassification": "ModernBertForTokenClassification",
    "QuestionAnswering": "ModernBertForQuestionAnswering",
    "MultipleChoice": "ModernBertForMultipleChoice",
}
