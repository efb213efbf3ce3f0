"""Pipelines: text in, answers out. One file a task, one line in the table."""

from __future__ import annotations

import importlib
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import modernbert
from modernbert.errors import InputError
from modernbert.io.hub import Source

if TYPE_CHECKING:
    from modernbert.pipelines.base import Pipeline

# Task -> its class, and the small model that comes with the package and serves where none is named, if one does.
TASKS: dict[str, tuple[str, str | None]] = {
    "fill-mask": ("fill_mask.FillMaskPipeline", "encoder"),
    "text-classification": ("text_classification.TextClassificationPipeline", None),
    "zero-shot-classification": ("zero_shot_classification.ZeroShotClassificationPipeline", None),
    "token-classification": ("token_classification.TokenClassificationPipeline", None),
    "question-answering": ("question_answering.QuestionAnsweringPipeline", None),
    "multiple-choice": ("multiple_choice.MultipleChoicePipeline", None),
    "feature-extraction": ("feature_extraction.FeatureExtractionPipeline", "encoder"),
    "sentence-embedding": ("sentence_embedding.SentenceEmbeddingPipeline", "sentence-encoder"),
    "sparse-embedding": ("sparse_embedding.SparseEmbeddingPipeline", "sparse-encoder"),
    "late-interaction": ("late_interaction.LateInteractionPipeline", "multi-vector-encoder"),
    "text-ranking": ("text_ranking.TextRankingPipeline", "multi-vector-encoder"),
    "text-generation": ("text_generation.TextGenerationPipeline", "decoder"),
    "text-scoring": ("text_scoring.TextScoringPipeline", "decoder"),
}
ALIASES = {"ner": "token-classification", "sentiment-analysis": "text-classification"}
# The task of a checkpoint's own head, where nobody names one.
_USUAL = {
    "base": "feature-extraction",
    "masked-lm": "fill-mask",
    "causal-lm": "text-generation",
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "multiple-choice": "multiple-choice",
}


def small_model(name: str = "encoder") -> Path:
    """Folder of a small checkpoint that comes with the package, by the name that `TASKS` gives it."""
    return Path(str(files("modernbert"))) / "small" / name


def small_model_of(task: str) -> Path:
    """Folder of the small checkpoint for a task; raises `InputError` if none comes with the package."""
    name = TASKS[task][1]
    if name is None:
        raise InputError(f"model is not given; {task} needs one that was trained for it, a folder or a Hub repository")
    return small_model(name)


def pipeline(
    task: str | None = None,
    model: Any = None,
    tokenizer: Any = None,
    device: Any = None,
    dtype: Any = None,
    *,
    torch_dtype: Any = None,
    **kwargs: Any,
) -> Pipeline[Any, Any, Any]:
    """Create a pipeline: a model with its tokenizer, which takes texts and gives answers.

    Example:
        fill = pipeline("fill-mask", "answerdotai/ModernBERT-base")
        fill("The capital of France is [MASK].")

    Args:
        task: "fill-mask", "text-classification" (or "sentiment-analysis"), "zero-shot-classification",
            "token-classification" (or "ner"), "question-answering", "multiple-choice", "feature-extraction",
            "sentence-embedding", "sparse-embedding", "late-interaction", "text-ranking", "text-generation" or
            "text-scoring". If it is not given, the task is the one that the model's head was made for.
        model: a folder, a repository on the Hub, or a model, which is put in evaluation mode and needs `tokenizer`. If
            it is not given, a small model that comes with the package is used, if there is one for the task: for
            fill-mask and feature-extraction, sentence-embedding, sparse-embedding, late-interaction, text-ranking,
            text-generation and text-scoring.
        tokenizer: a tokenizer, or a folder or repository that holds one. If it is not given, that of the model.
        device: such as "cpu", "cuda:0", or 0 for the first GPU. If it is not given, the CPU is used; a loaded model
            stays on its device.
        dtype: dtype of the weights, such as "bfloat16". If it is not given, or "auto", that of the checkpoint is used.
        torch_dtype: older name of `dtype`.
        kwargs: `adapter`, `attn_implementation`, `device_map`, `quantization_config`, `revision`, `subfolder`,
            `cache_dir`, `token` and `local_files_only`, as for `from_pretrained`, and `model_kwargs`, a dict of more of
            them. One adapter is merged into the weights, unless `merge_adapter=False`; of a dict of several the first
            acts until `pipeline.model.set_adapter`;
            `config`, the model's configuration, or a folder or repository that holds it; `batch_tokens` (most tokens
            in a forward pass: 4,096 on a CPU, 65,536 on a GPU) or `batch_size`; and options of the task, as defaults
            for its calls.

    Returns:
        The pipeline. Its class describes the inputs, options and answers of the task: `help(pipeline("fill-mask"))`.

    Raises:
        InputError: the task is unknown, or an argument has no meaning for it.
        NotFoundError, CheckpointError: the model cannot be found or loaded.
    """
    if (token := kwargs.pop("use_auth_token", None)) is not None:
        kwargs.setdefault("token", token)
    task = ALIASES.get(str(task), task)
    if isinstance(model, str | Path):
        from modernbert.models.adapters import with_base

        name, (model, kwargs) = model, with_base(model, kwargs)
        if model != name and tokenizer is None and Source(name).find("tokenizer.json") is not None:
            tokenizer = name
    if task is None and model is not None:
        task = task_of(model, kwargs)
    if task not in TASKS:
        raise InputError(f"task is {task!r}; choose one of {', '.join([*TASKS, *ALIASES])}")
    path = TASKS[task][0]
    module, _, name = path.rpartition(".")
    cls: type[Pipeline[Any, Any, Any]] = getattr(importlib.import_module(f"modernbert.pipelines.{module}"), name)
    dtype = torch_dtype if dtype is None else dtype
    if model is None:
        model = small_model_of(str(task))
        dtype = "float32" if dtype is None else dtype
    return cls.load(model, tokenizer, device=device, dtype=dtype, **kwargs)


def task_of(model: Any, kwargs: dict[str, Any]) -> str:
    """The task of a model's head, or of the head that an adapter brings."""
    from modernbert.auto import kind_of, kind_of_adapter
    from modernbert.models.adapters import with_base
    from modernbert.models.sentence_layout import CROSS_ENCODER, MODEL, SERVED_BY, contents_of

    model, kwargs = with_base(model, kwargs)
    if isinstance(model, str | Path):
        source = Source.pop_from(model, dict(kwargs))
        contents = contents_of(source)
        if contents.kind != MODEL:
            if contents.kind == CROSS_ENCODER:
                return "text-ranking"
            return SERVED_BY[contents.kind][1] if contents.kind in SERVED_BY else "sentence-embedding"
        values = source.read_json("config.json")
    else:
        known = {"SentenceEncoder": "sentence-embedding", **dict(SERVED_BY.values())}
        if (name := type(model).__name__) in known:
            return known[name]
        values = {"architectures": [type(model).__name__]}
        model = type(model).__name__
    kind = kind_of_adapter(kwargs.get("adapter")) or kind_of(values)
    if kind is None:
        raise InputError(
            f"task is not given, and {model} does not say what it is for; choose one of {', '.join(TASKS)}"
        )
    return _USUAL[kind]


def __getattr__(name: str) -> Any:
    if name == "Pipeline":
        from modernbert.pipelines.base import Pipeline

        return Pipeline
    if name in modernbert.__all__ and name.endswith("Pipeline"):
        return getattr(modernbert, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")


__all__ = ["TASKS", "Pipeline", "pipeline", "small_model"]
