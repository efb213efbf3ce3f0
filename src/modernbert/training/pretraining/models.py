"""The model at the start of pretraining: a new one, or one with the weights of an encoder or a decoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from torch import Tensor

from modernbert.auto import AutoConfig
from modernbert.config import Config, ModernBertConfig
from modernbert.errors import CheckpointError, ConfigError, InputError, listed
from modernbert.io.checkpoint import read_weights, weight_files
from modernbert.io.hub import Source
from modernbert.models.formats import refuse_to_train
from modernbert.text.tokenizer import Tokenizer as LoadedTokenizer
from modernbert.training.pretraining.objectives import LanguageModel, LanguageObjective
from modernbert.training.pretraining.options import PretrainOptions
from modernbert.training.pretraining.shards import fingerprint


def make_model(
    objective: LanguageObjective, tokenizer: Tokenizer, options: PretrainOptions, max_length: int
) -> LanguageModel:
    """The model to train, in float32 on the CPU.

    Args:
        objective: decides whether it is an encoder or a decoder.
        tokenizer: of the data.
        options: of the run.
        max_length: longest text of the data, in tokens.

    Raises:
        InputError: the model's tokenizer is not the data's, or its context is too short for the data.
        ConfigError: an option makes no architecture.
    """
    if options.context is not None and options.context < max_length:
        raise InputError(f"context is {options.context}, and texts of the data have up to {max_length} tokens")
    torch.manual_seed(options.seed)
    if options.model is not None:
        return _started(objective, tokenizer, options, max_length)
    base: dict[str, Any] = {}
    if options.config is not None:
        path = Path(options.config)
        path = path / "config.json" if path.is_dir() else path
        base = Source(path.parent).read_json(path.name)
    sizes = {
        "hidden_size": options.hidden_size,
        "intermediate_size": options.intermediate_size,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "initializer_range": options.initializer_range,
    }
    ids = {name: tokenizer.token_to_id(f"[{name.upper()}]") for name in ("cls", "sep", "pad")}
    values = {
        **base,
        **{name: value for name, value in sizes.items() if value is not None},
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": options.context or max_length,
        "pad_token_id": ids["pad"],
        "cls_token_id": ids["cls"],
        "bos_token_id": ids["cls"],
        "sep_token_id": ids["sep"],
        "eos_token_id": ids["sep"],
    }
    config: Any = objective.model_class.config_class.from_dict(values)
    model: Any = objective.model_class
    return cast(LanguageModel, model(config.replace(**_rope(options, config, config.max_position_embeddings))))


def _started(
    objective: LanguageObjective, tokenizer: Tokenizer, options: PretrainOptions, max_length: int
) -> LanguageModel:
    assert options.model is not None
    source = Source(options.model)
    own = LoadedTokenizer.from_pretrained(options.model).backend if source.find("tokenizer.json") else tokenizer
    if fingerprint(own) != fingerprint(tokenizer):
        raise InputError(f"{options.model} has another tokenizer than the data; prepare the data with its own")
    found: Any = AutoConfig.from_pretrained(options.model)
    refuse_to_train(found, str(options.model))
    if found.vocab_size < tokenizer.get_vocab_size():
        raise InputError(
            f"{options.model} has {found.vocab_size} ids and the data's tokenizer {tokenizer.get_vocab_size()}; "
            "prepare the data with its own"
        )
    longest = options.context or found.max_position_embeddings
    if longest < max_length:
        raise InputError(
            f"texts of the data have up to {max_length} tokens and {options.model} reads {longest}; extend it with "
            f"context {max_length}, or prepare shorter texts"
        )
    kind: Any = objective.model_class
    shared = found.replace(max_position_embeddings=longest)
    shared = shared.replace(**_rope(options, shared, found.max_position_embeddings))
    if type(found) is kind.config_class:
        return cast(LanguageModel, kind.from_pretrained(options.model, config=shared, dtype=torch.float32))
    values = {k: v for k, v in shared.to_dict().items() if k not in ("model_type", "architectures", "use_cache")}
    weights = dict(read_weights(weight_files(source), lambda name: True))
    translate = to_encoder_weights if kind.config_class is ModernBertConfig else to_decoder_weights
    config = kind.config_class.from_dict(values)
    return cast(LanguageModel, filled(kind, config, translate(weights), options.model, "give a language model"))


def filled(
    kind: Any, config: Config, weights: Mapping[str, Tensor], name: str, hint: str = "check its configuration"
) -> Any:
    """A model of a class and a configuration with these weights, in float32.

    Raises:
        CheckpointError: weights and configuration do not fit; the message has the checkpoint's name and a hint.
    """
    model = kind(config)
    tied = {"decoder.weight"} if config.tie_word_embeddings else set()
    own, given = ({k: v for k, v in some.items() if k not in tied} for some in (model.state_dict(), weights))
    misshapen = [k for k in own if k in given and own[k].shape != given[k].shape]
    wrong = {"lacks": own.keys() - given.keys(), "does not know": given.keys() - own.keys(),
             "has another shape of": misshapen}  # fmt: skip
    found = [f"{what} {listed(sorted(names), 3)}" for what, names in wrong.items() if names]
    if found:
        raise CheckpointError(f"the model of {name} {'; '.join(found)}; {hint}")
    model.load_state_dict({k: v.float() for k, v in given.items()}, strict=False)
    model.tie_weights()
    return model


def _rope(options: PretrainOptions, config: Any, before: int) -> dict[str, Any]:
    """Changes of the rotary embedding of a model whose context was `before`."""
    parameters = {kind: dict(rope) for kind, rope in config.rope_parameters.items()}
    thetas = {"full_attention": options.global_rope_theta, "sliding_attention": options.local_rope_theta}
    for kind, theta in thetas.items():
        if theta is not None:
            parameters[kind]["rope_theta"] = theta
    parameters["full_attention"] |= options.scaling  # local layers never reach beyond the first context
    if options.scaling.get("rope_type") == "yarn":
        parameters["full_attention"]["original_max_position_embeddings"] = before
    return {"rope_parameters": parameters} if parameters != config.rope_parameters else {}


def to_encoder_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a decoder with its output, under an encoder's names: q, k and v are one matrix, and the head moves."""
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        before, found, rest = name.partition(".attn.q_proj.")
        if found:
            parts = [weights[f"{before}.attn.{part}_proj.{rest}"] for part in "qkv"]
            out[f"{before}.attn.Wqkv.{rest}"] = torch.cat(parts).float()
        elif ".attn.k_proj." not in name and ".attn.v_proj." not in name:
            out[name.replace("lm_head.", "head.")] = value.float()
    return out


def to_decoder_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of an encoder with its output, under a decoder's names."""
    out: dict[str, Tensor] = {}
    for name, value in weights.items():
        before, found, rest = name.partition(".attn.Wqkv.")
        if found:
            for part, rows in zip("qkv", value.float().chunk(3), strict=True):
                out[f"{before}.attn.{part}_proj.{rest}"] = rows.clone()
        else:
            out["lm_head." + name.removeprefix("head.") if name.startswith("head.") else name] = value.float()
    return out


def check_same(model: LanguageModel, checkpoint: Path) -> None:
    """Raise `ConfigError` if a checkpoint has another architecture than a model."""
    theirs = model.config_class.from_dict(Source(checkpoint).read_json("config.json")).to_dict()
    for name, mine in model.config.to_dict().items():
        if name not in ("dtype", "architectures", "transformers_version") and theirs.get(name) != mine:
            raise ConfigError(
                f"{checkpoint} has {name} {theirs.get(name)!r} and this run {mine!r}; resume it with the same"
            )
