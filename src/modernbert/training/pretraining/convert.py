"""`convert`: checkpoints of training runs become folders that `from_pretrained` loads.

Two kinds are read: sharded checkpoints of this package's runs, and checkpoints of ModernBERT's original trainer
(https://github.com/AnswerDotAI/ModernBERT), which the Composer library writes: one file of `torch.save` with the
model's state under "state" and, among other things, its configuration and tokenizer.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from modernbert.auto import AutoConfig
from modernbert.checks import described
from modernbert.config import Config, ModernBertConfig, ModernBertDecoderConfig
from modernbert.errors import CheckpointError, InputError, listed
from modernbert.io.files import making
from modernbert.io.hub import Source
from modernbert.models.decoder import ModernBertDecoderForCausalLM
from modernbert.models.heads import ModernBertForMaskedLM, ModernBertForSequenceClassification
from modernbert.text.tokenizer import Tokenizer
from modernbert.training.distributed import SHARDS, merged_weights
from modernbert.training.pretraining.models import filled, to_decoder_weights

# Fields that the original trainer shares with us, under the same name or another one.
_SAME = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    *("decoder_bias", "tie_word_embeddings", "pad_token_id"),
)
_RENAMED = {
    "hidden_act": "hidden_activation",
    "head_pred_act": "classifier_activation",
    "rotary_emb_base": "global_rope_theta",
    "init_std": "initializer_range",
    "init_cutoff_factor": "initializer_cutoff_factor",
    "attn_qkv_bias": "attention_bias",
    "attention_probs_dropout_prob": "attention_dropout",
    "embed_dropout_prob": "embedding_dropout",
    "mlp_in_bias": "mlp_bias",
    "mlp_dropout_prob": "mlp_dropout",
    "head_pred_bias": "classifier_bias",
    "pooling_type": "classifier_pooling",
}
# Fields by which the original trainer builds other models too: (field, ModernBERT's value, the value if not given).
_ONLY = (
    ("bert_layer", "prenorm", "prenorm"),
    ("attention_layer", "rope", "base"),
    ("mlp_layer", "glu", "mlp"),
    ("embedding_layer", "sans_pos", "absolute_pos"),
    ("normalization", "layernorm", "rmsnorm"),
    ("final_norm", True, False),
    ("embed_norm", True, True),
    ("skip_first_prenorm", True, False),
    ("rotary_emb_interleaved", False, False),
    ("head_pred_norm", True, True),
    ("rotary_emb_dim", None, None),
    ("local_attn_rotary_emb_dim", None, None),
    ("rotary_emb_scale_base", None, None),
    ("initial_attention_layer", None, None),
    ("initial_bert_layer", None, None),
    ("initial_mlp_layer", None, None),
)
_KINDS: dict[Any, type[Config]] = {kind.model_type: kind for kind in (ModernBertConfig, ModernBertDecoderConfig)}
_TOKENS = {"pad": "[PAD]", "cls": "[CLS]", "bos": "[CLS]", "sep": "[SEP]", "eos": "[SEP]"}


def convert(
    source: str | Path,
    output: str | Path,
    *,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    allow_pickle: bool = False,
) -> Path:
    """Write a training checkpoint in Hugging Face's format.

    Args:
        source: a sharded `checkpoint-STEP` folder of a run, or a file of the original trainer: .pt as Composer or
            `torch.save` wrote it, or .safetensors with its names.
        output: folder to make; it must not exist. Written under another name and renamed once it is whole.
        config: JSON file with the configuration, the original trainer's or ours, if the file has none.
        tokenizer: folder or Hub repository of the tokenizer, if the file has none.
        allow_pickle: read a .pt file, which is a pickle, as plain data (`weights_only`).

    Raises:
        CheckpointError: the file is no such checkpoint, lacks something, or is a pickle and `allow_pickle` is False.
        InputError: the output exists.
    """
    source, output = Path(source), Path(output)
    if output.exists():
        raise InputError(f"output is {output}, which exists; name a folder to make")
    if source.is_dir():
        if config is not None:
            raise InputError(f"config is given, and {source} has its own")
        if not list(source.glob(SHARDS)):
            raise CheckpointError(f"{source} holds no shard of a run; a folder with model.safetensors loads as it is")
        weights, found = merged_weights(source), AutoConfig.from_pretrained(source)
        texts = {name: (source / name).read_text("utf-8") for name in ("tokenizer.json", "tokenizer_config.json")}
    else:
        state, settings, texts = _read(source, allow_pickle)
        weights = {_renamed(name): value for name, value in state.items()}
        given = settings if config is None else Source(Path(config).parent).read_json(Path(config).name)
        if given is None:
            raise CheckpointError(f"{source} holds no configuration; give one with config=FILE")
        found = configuration(given, weights, str(source if config is None else config))
        if isinstance(found, ModernBertDecoderConfig):
            weights = to_decoder_weights(weights)
        found = found.replace(**_special_ids(texts, tokenizer))
    model = _model(found, weights, str(source))
    with making(output) as temporary:
        model.save_pretrained(temporary)
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            Tokenizer.from_pretrained(tokenizer).save_pretrained(temporary)
    return output


def configuration(given: Mapping[str, Any], weights: Mapping[str, Tensor], name: str) -> Config:
    """Our configuration for the original trainer's, or for one of ours.

    Args:
        given: fields by their names.
        weights: the model's; the shape of the embedding gives the size of the vocabulary.
        name: of the file, for messages.

    Raises:
        CheckpointError: the architecture is not ModernBERT's.
    """
    if given.get("model_type") in _KINDS:
        return _KINDS[given["model_type"]].from_dict(dict(given))
    given = {field: value for field, value in given.items() if value is not None}  # null means not given
    for field, wanted, otherwise in _ONLY:
        if given.get(field, otherwise) != wanted:
            found = given.get(field, otherwise)
            raise CheckpointError(f"{name} has {field} {found!r}, and ModernBERT has {wanted!r}; it is another model")
    for one, other in (("attn_qkv_bias", "attn_out_bias"), ("mlp_in_bias", "mlp_out_bias")):
        if bool(given.get(one)) != bool(given.get(other)):
            raise CheckpointError(f"{name} has {one} {given.get(one)} and {other} {given.get(other)}; they must agree")
    values = {field: given[field] for field in _SAME if field in given}
    values |= {ours: given[theirs] for theirs, ours in _RENAMED.items() if theirs in given}
    values.setdefault("classifier_activation", "silu")
    embedding = weights.get("model.embeddings.tok_embeddings.weight")
    if embedding is None:
        raise CheckpointError(f"the weights are not under the original trainer's names: {listed(sorted(weights), 3)}")
    values["vocab_size"] = len(embedding)
    norm = {field: value for field, value in given.get("norm_kwargs", {}).items() if value is not None}
    values["norm_eps"], values["norm_bias"] = norm.get("eps", 1e-5), norm.get("bias", True)
    window, every = given.get("sliding_window") or -1, given.get("global_attn_every_n_layers") or -1
    values["local_attention"] = window if window > 0 else 128
    values["global_attn_every_n_layers"] = every if every > 0 and window > 0 else 1
    if window > 0 and every <= 0:
        values["layer_types"] = ["sliding_attention"] * given.get("num_hidden_layers", 22)
    local = given.get("local_attn_rotary_emb_base", -1)
    theta = given.get("rotary_emb_base", 10_000.0)
    values["global_rope_theta"], values["local_rope_theta"] = theta, local if local and local > 0 else theta
    causal = bool(given.get("causal_mask"))
    return (ModernBertDecoderConfig if causal else ModernBertConfig).from_dict(values)


def _special_ids(texts: Mapping[str, str], tokenizer: str | Path | None) -> dict[str, int]:
    """Ids of the special tokens by the tokenizer that the folder will have."""
    if tokenizer is not None:
        backend = Tokenizer.from_pretrained(tokenizer).backend
    elif "tokenizer.json" in texts:
        backend = tokenizers.Tokenizer.from_str(texts["tokenizer.json"])
    else:
        return {}
    ids = {f"{name}_token_id": backend.token_to_id(token) for name, token in _TOKENS.items()}
    return {name: i for name, i in ids.items() if i is not None}


def _read(path: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], dict[str, Any] | None, dict[str, str]]:
    """State, configuration and files of the tokenizer of a file; None or nothing where it has none."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path), None, {}
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from error
    with path.open("rb") as file:
        start = file.read(4)
    if start[:1] != b"\x80" and start != b"PK\x03\x04":
        raise CheckpointError(f"{path} is no checkpoint: neither a .safetensors file nor a .pt file of torch.save")
    if not allow_pickle:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when it is loaded; if you trust it, allow_pickle=True reads it "
            "with weights_only, which builds plain data alone"
        )
    whole = _unpickled(path)
    state = whole.get("state", whole)
    weights = state.get("model", state) if isinstance(state, Mapping) else {}
    if not isinstance(weights, Mapping) or not any("tok_embeddings" in str(name) for name in weights):
        raise CheckpointError(
            f"{path} holds no state of ModernBERT's original trainer: no name has tok_embeddings in it"
        )
    hugging = (state.get("integrations") or {}).get("huggingface") or {}
    settings = ((hugging.get("model") or {}).get("config") or {}).get("content")
    files = hugging.get("tokenizer") or {}
    texts = {
        name + entry["file_extension"] * (not name.endswith(entry["file_extension"])): json.dumps(entry["content"])
        for name, entry in files.items()
        if isinstance(entry, Mapping) and isinstance(entry.get("content"), Mapping)
    }
    kept = {name: text for name, text in texts.items() if name in ("tokenizer.json", "tokenizer_config.json")}
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}, settings, kept


def _unpickled(path: Path) -> dict[str, Any]:
    """A file of plain data, to which numpy's random state and Composer's clock belong."""
    array: Any = np.empty(0).__reduce__()  # the function that unpickling an array calls stands first
    plain = [array[0], np.ndarray, np.dtype, *(type(np.dtype(t)) for t in (np.uint32, np.int64)), datetime.timedelta]
    try:
        with torch.serialization.safe_globals(plain):
            whole = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a pickle is missing shows as an error of many kinds
        raise CheckpointError(f"{path} cannot be read as plain data: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(whole, dict):
        raise CheckpointError(f"{path} holds {described(whole)}; it must be a dictionary of tensors")
    return whole


def _renamed(name: str) -> str:
    """A name of the original trainer as ours: no wrappers, no "bert", no "encoder"."""
    name = name.replace("_orig_mod.", "").removeprefix("module.").removeprefix("model.")
    body, found, rest = name.partition("bert.")
    if found and not body:
        return "model." + rest.removeprefix("encoder.")
    return name


def _model(config: Config, weights: dict[str, Tensor], name: str) -> Any:
    kind: Any = ModernBertForMaskedLM
    if isinstance(config, ModernBertDecoderConfig):
        kind = ModernBertDecoderForCausalLM
    elif "classifier.weight" in weights:
        kind = ModernBertForSequenceClassification
        config = config.replace(num_labels=len(weights["classifier.weight"]))
    return filled(kind, config, weights, name, "its configuration does not fit its weights")
