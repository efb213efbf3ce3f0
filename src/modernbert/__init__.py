"""ModernBERT in PyTorch: run, fine-tune, quantize and pretrain encoders and decoders, without computing padding.

Names are imported when they are first used, so that `import modernbert` takes no time.
"""

from __future__ import annotations

import importlib
from typing import Any

from modernbert.lazy import exports

_EXPORTS = {
    "AddedToken": "text.tokenizer",
    "AutoConfig": "auto",
    "AutoModel": "auto",
    "AutoModelForCausalLM": "auto",
    "AutoModelForMaskedLM": "auto",
    "AutoModelForMultipleChoice": "auto",
    "AutoModelForPreTraining": "auto",
    "AutoModelForQuestionAnswering": "auto",
    "AutoModelForSequenceClassification": "auto",
    "AutoModelForTokenClassification": "auto",
    "AutoTokenizer": "auto",
    "BatchEncoding": "text.encoding",
    "BitsAndBytesConfig": "quantization.options",
    "DecoderCache": "decoding.cache",
    "DynamicCache": "decoding.cache",
    "FeatureExtractionPipeline": "pipelines.feature_extraction",
    "FillMaskPipeline": "pipelines.fill_mask",
    "GenerateOutput": "decoding.generate",
    "GenerationConfig": "decoding.config",
    "LogitsProcessor": "decoding.processors",
    "LogitsProcessorList": "decoding.processors",
    "ModernBertConfig": "config",
    "ModernBertDecoderConfig": "config",
    "ModernBertDecoderForCausalLM": "models.decoder",
    "ModernBertDecoderForSequenceClassification": "models.decoder",
    "ModernBertDecoderModel": "models.decoder",
    "ModernBertDecoderPreTrainedModel": "models.decoder",
    "ModernBertForMaskedLM": "models.heads",
    "ModernBertForMultipleChoice": "models.heads",
    "ModernBertForQuestionAnswering": "models.heads",
    "ModernBertForSequenceClassification": "models.heads",
    "ModernBertForTokenClassification": "models.heads",
    "ModernBertModel": "models.encoder",
    "ModernBertPreTrainedModel": "models.encoder",
    "MultiVectorEncoder": "retrieval.multi_vector",
    "MultiVectorSettings": "retrieval.multi_vector",
    "OnePass": "pipelines.one_pass",
    "Pipeline": "pipelines.base",
    "PreTrainedConfig": "config",
    "PreTrainedModel": "models.base",
    "PreTrainedTokenizer": "text.tokenizer",
    "PreTrainedTokenizerBase": "text.tokenizer",
    "PreTrainedTokenizerFast": "text.tokenizer",
    "PretrainedConfig": "config",
    "QuantizationConfig": "quantization.options",
    "QuestionAnsweringPipeline": "pipelines.question_answering",
    "SentenceEncoder": "models.sentence_encoder",
    "SparseEncoder": "retrieval.sparse",
    "SparseVector": "retrieval.sparse",
    "StoppingCriteria": "decoding.processors",
    "StoppingCriteriaList": "decoding.processors",
    "TextClassificationPipeline": "pipelines.text_classification",
    "TextGenerationPipeline": "pipelines.text_generation",
    "TextIteratorStreamer": "decoding.text",
    "TextStreamer": "decoding.text",
    "TokenClassificationPipeline": "pipelines.token_classification",
    "Tokenizer": "text.tokenizer",
    "ZeroShotClassificationPipeline": "pipelines.zero_shot_classification",
    "export": "interop.exporting.run",
    "finetune": "training.finetuning",
    "logging": "logging",
    "maxsim": "retrieval.maxsim",
    "patch": "interop.patching",
    "pipeline": "pipelines",
    "quantize": "quantization.gate",
    "set_seed": "models.placement",
    "unpatch": "interop.patching",
    "validate": "interop.validation",
}
__version__ = "0.1.0"
_find, _ = exports(__name__, _EXPORTS)
__all__ = sorted([*_EXPORTS, "__version__"])


def __getattr__(name: str) -> Any:
    if name.startswith(("Train", "DataCollator", "default_data", "EvalPred", "get_")) or name.endswith("Callback"):
        raise ImportError(f"{name} is transformers' own, and works with these models: from transformers import {name}")
    if _EXPORTS.get(name, "config") not in ("config", "logging", "text.encoding", "text.tokenizer"):
        importlib.import_module(f"{__name__}.quantization")  # which lets models read its checkpoints
    return _find(name)


def __dir__() -> list[str]:
    return __all__
