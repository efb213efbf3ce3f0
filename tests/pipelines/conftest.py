"""What the tests of pipelines share."""

HEADS = {
    "Model": "ModernBertModel",
    "SequenceClassification": "ModernBertForSequenceClassification",
    "TokenClassification": "ModernBertForTokenClassification",
    "QuestionAnswering": "ModernBertForQuestionAnswering",
    "MultipleChoice": "ModernBertForMultipleChoice",
}
