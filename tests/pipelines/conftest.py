"""What the tests of pipelines share: small random checkpoints of every head."""

import pytest
import torch

import modernbert
from modernbert.pipelines import small_model
from modernbert.tokenizer import Tokenizer

HEADS = {
    "Model": "ModernBertModel",
    "MaskedLM": "ModernBertForMaskedLM",
    "SequenceClassification": "ModernBertForSequenceClassification",
    "TokenClassification": "ModernBertForTokenClassification",
    "QuestionAnswering": "ModernBertForQuestionAnswering",
    "MultipleChoice": "ModernBertForMultipleChoice",
}


@pytest.fixture(scope="session")
def heads(tmp_path_factory):
    """A folder for each head: random weights, the small model's tokenizer, a context of 512 tokens."""
    root = tmp_path_factory.mktemp("small-heads")
    config = modernbert.AutoConfig.from_pretrained(small_model()).replace(
        hidden_size=48, intermediate_size=64, num_attention_heads=3, initializer_range=0.3
    )
    tokenizer = Tokenizer.from_pretrained(small_model())
    for head, cls in HEADS.items():
        torch.manual_seed(0)
        getattr(modernbert, cls)(config).save_pretrained(root / head)
        tokenizer.save_pretrained(root / head)
    return root
