"""Late interaction: a vector of every token, compared by MaxSim. Folders of three libraries, in and out.

sentence-transformers 6 (`MultiVectorEncoder`), PyLate (`ColBERT`) and Stanford's ColBERT write the same settings in
different places; here they become one `MultiVectorSettings`.

Shapes: B texts, T tokens of all texts together, D dimensions of a vector.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import string
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from modernbert.errors import CheckpointError, ConfigError, InputError, listed, shown
from modernbert.io.checkpoint import read_weights, weight_files, weight_names, write_weights
from modernbert.io.files import write_text
from modernbert.io.hub import Source
from modernbert.models.encoder import ModernBertModel
from modernbert.models.formats import weight_format
from modernbert.models.placement import warn_once
from modernbert.models.sentence_encoder import (
    Dense,
    Normalize,
    Part,
    SentenceEncoder,
    dense_part,
    layers_of,
    refuse_decoder,
    write_layout,
)
from modernbert.models.sentence_layout import (
    LATE_INTERACTION,
    MODEL,
    SENTENCE_ENCODER,
    STANFORD,
    TRANSFORMER_SETTINGS,
    Contents,
    EmbeddingSettings,
    contents_of,
    kind_of_part,
    settings_of,
)
from modernbert.nn.attention.contract import Reach
from modernbert.nn.attention.sdpa import Piece, SdpaAttention, SdpaPlan, lay_out, way
from modernbert.nn.inputs import Inputs
from modernbert.nn.packing import PackedInputs, Packing

LAYOUTS = ("sentence-transformers", "pylate", "stanford")
_IDENTITY = "torch.nn.modules.linear.Identity"
_MASK, _POOLING = "MultiVectorMask", "HierarchicalTokenPooling"
_METADATA = "artifact.metadata"  # Stanford's settings
_DIMENSIONS = 128  # of a fresh projection
_TYPES = "sentence_transformers.multi_vector_encoder.modules."


@dataclasses.dataclass(frozen=True)
class Expansion:
    """How queries are made longer: tokens after a query's own, which are compared with documents too.

    Attributes:
        length: tokens that a query has at least.
        is_fixed: whether longer queries are cut to that.
        attend: whether the query's tokens see those that were added; else nobody does, not even they each other.
        token: the token that is added; None is [MASK].
    """

    length: int
    is_fixed: bool = True
    attend: bool = False
    token: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.length, int) or isinstance(self.length, bool) or self.length < 1:
            raise ConfigError(f"the length of query expansion is {shown(self.length)}; it must be at least 1")

    @classmethod
    def of(cls, values: Any) -> Expansion | None:
        """Read what sentence-transformers writes."""
        if values is None:
            return None
        known = {"strategy", "attend", "token", "length"}
        if not isinstance(values, dict) or values.get("strategy") not in ("fixed", "min") or set(values) - known:
            raise CheckpointError(
                f"query_expansion is {shown(values)}; it must have a length, a strategy, fixed or min, attend and token"
            )
        return cls(
            values.get("length", 0), values["strategy"] == "fixed", bool(values.get("attend")), values.get("token")
        )

    def to_dict(self) -> dict[str, Any]:
        strategy = "fixed" if self.is_fixed else "min"
        return {"strategy": strategy, "attend": self.attend, "token": self.token, "length": self.length}


@dataclasses.dataclass(frozen=True)
class MultiVectorSettings(EmbeddingSettings):
    """What a folder says about the vectors of tokens besides weights; prompts are named "query" and "document".

    Attributes:
        similarity: "maxsim", or "meanmaxsim", which is that by the number of a query's vectors.
        query_length, document_length: tokens that texts are cut to; None is the model's context.
        expansion: of queries; None leaves them as they are.
        skipped_words: tokens whose vectors are left out.
        skipped_in: of which texts, "document" and "query".
        pool_factor: a document keeps one vector for so many tokens, those of similar ones averaged; 1 keeps all.
        protected_tokens: first tokens of a document whose vectors are never averaged.
        pool_normalizes: whether averaged vectors have length one again.
        prefixes: prompts that are single tokens, and were put before a text's ids instead of before the text.
    """

    similarities: ClassVar[tuple[str, ...]] = ("maxsim", "meanmaxsim")

    poolings: tuple[str, ...] = ()
    similarity: str = "maxsim"
    query_length: int | None = None
    document_length: int | None = None
    expansion: Expansion | None = None
    skipped_words: tuple[str, ...] = ()
    skipped_in: tuple[str, ...] = ("document",)
    pool_factor: float = 1.0
    protected_tokens: int = 1
    pool_normalizes: bool = True
    prefixes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("query_length", "document_length"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name} is {shown(value)}; it must be a whole number of at least 1")
        if not isinstance(self.pool_factor, int | float) or not self.pool_factor >= 1:
            raise ConfigError(f"pool_factor is {shown(self.pool_factor)}; it must be at least 1")
        if unknown := set(self.skipped_in) - {"query", "document"}:
            raise ConfigError(f"words are skipped in {listed(sorted(unknown))}; known are query and document")


class MultiVectorEncoder(SentenceEncoder):
    """An encoder with a vector of every token, projected and of length one.

    Args:
        model: the encoder.
        settings: prompts, lengths, expansion of queries, skipped words.
        after_tokens: the projection and the normalisation; None is a fresh one to 128 dimensions, to be trained.

    Source: ColBERT, arXiv:2004.12832; PyLate, arXiv:2508.03555.
    """

    settings: MultiVectorSettings

    def __init__(
        self,
        model: ModernBertModel,
        settings: MultiVectorSettings | None = None,
        after_tokens: Sequence[nn.Module] | None = None,
    ) -> None:
        if after_tokens is None:
            dense = Dense(model.config.hidden_size, _DIMENSIONS, bias=False, activation=_IDENTITY)
            after_tokens = [dense.to(device=model.device, dtype=model.dtype), Normalize()]
        super().__init__(model, settings or MultiVectorSettings(), after_tokens)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        seen: Sequence[int] | None = None,
    ) -> Tensor:
        """A vector of every real token, (T, D), texts end to end; gradients reach the model through them.

        Args:
            input_ids: (B, S), or (T,) with `cu_seqlens`.
            attention_mask: (B, S), nonzero at real tokens.
            cu_seqlens: (B + 1,) cumulative lengths of packed texts.
            seen: how many first tokens of each text all its tokens see; None if they see all of it.
        """
        inputs = self.model.pack_inputs(Inputs(input_ids, attention_mask, cu_seqlens=cu_seqlens))
        lengths = inputs.packing.lengths
        is_partly = [] if seen is None else [s < length for s, length in zip(seen, lengths, strict=True)]
        if not any(is_partly) or all(is_partly):
            return self.token_vectors(inputs, seen if any(is_partly) else None)
        assert seen is not None
        assert inputs.ids_T is not None
        ids = inputs.ids_T.split(list(lengths))
        found: dict[int, Tensor] = {}
        for partly in (True, False):  # only short texts, queries, are worth attention by masks
            texts = [text for text, of_text in enumerate(is_partly) if of_text == partly]
            some = PackedInputs.of_rows([ids[text].tolist() for text in texts], self.device)
            vectors_TD = self.token_vectors(some, [seen[text] for text in texts] if partly else None)
            found.update(zip(texts, vectors_TD.split([lengths[text] for text in texts]), strict=True))
        return torch.cat([found[text] for text in range(len(lengths))])

    def token_vectors(self, inputs: PackedInputs, seen: Sequence[int] | None = None) -> Tensor:
        """A vector of every token, (T, D).

        Args:
            inputs: packed texts.
            seen: how many first tokens of each text all its tokens see; None if they see all of it.
        """
        backend = None if seen is None else PartlySeen(seen)
        states_TD = self.model.encode(inputs, backend=backend).last_TM
        # MaxSim adds up as many products as a query has vectors: in training, most of the rounding of a score would be
        # that of a projection and of lengths in bfloat16, which take next to no time in float32.
        with torch.autocast(states_TD.device.type, enabled=False):
            if states_TD.dtype != self.dtype and self.dtype == torch.float32:
                states_TD = states_TD.float()
            for part in self.after_tokens:
                states_TD = part(states_TD)
        return states_TD

    # Folders

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load a folder or a Hub repository, in evaluation mode.

        Args:
            pretrained_model_name_or_path: of sentence-transformers 6, PyLate or Stanford's ColBERT; a bare encoder gets
                a fresh projection, with a warning.
            kwargs: see `PreTrainedModel.from_pretrained`.

        Raises:
            NotFoundError: there is no such folder, repository or file.
            CheckpointError: it holds something else, or has parts or settings that are not known here.
        """
        quantization = kwargs.pop("quantization_config", None)
        source = Source.pop_from(str(pretrained_model_name_or_path), dict(kwargs))
        contents = contents_of(source)
        if contents.kind not in (LATE_INTERACTION, MODEL, SENTENCE_ENCODER) or contents.queries:
            raise CheckpointError(f"{contents.name} is a {contents.kind}, and has no vectors of tokens to compare")
        body = source.inside(contents.inner)
        refuse_decoder(body)
        stanford = not contents.parts and contents.kind == LATE_INTERACTION
        model = ModernBertModel.from_pretrained(
            pretrained_model_name_or_path, **kwargs | {"subfolder": body.subfolder or None}
        )
        layers: list[nn.Module] | None = _stanford_layers(body, model) if stanford else []
        values = _stanford_settings(source) if stanford else _settings(source, contents)
        for part in contents.parts[1:]:
            there, kind = source.inside(part["path"]), kind_of_part(part)
            config = there.read_json("config.json") if there.find("config.json") is not None else {}
            if kind == _MASK:
                if config.get("keep_only_token_ids"):
                    raise CheckpointError(f"{contents.name} has keep_only_token_ids, which is for images")
                values["skipped_words"] = tuple(config.get("skiplist_words") or ())
                values["skipped_in"] = tuple(config.get("skiplist_tasks") or ("document",))
            elif kind == _POOLING:
                values |= {"pool_factor": config.get("pool_factor", 1.0)}
                values |= {"protected_tokens": config.get("num_protected_tokens", 1)}
                values["pool_normalizes"] = config.get("normalize_embeddings", False)
            else:
                assert layers is not None
                layers += layers_of(there, kind, config, model, f"Transformer, {_MASK}, {_POOLING}")
        if contents.about.get("model_type") == "ColBERT" and not any(isinstance(x, Normalize) for x in layers or ()):
            assert layers is not None  # PyLate normalises without saying so, and skips punctuation
            layers.append(Normalize())
        if not contents.parts and not stanford:
            warn_once(f"{contents.name} has no projection of its tokens; a fresh one is made, which must be trained")
            layers = None
        encoder = cls(model, MultiVectorSettings(**values), layers)
        encoder._check_widths(contents.name)
        encoder.is_layout = contents.kind == LATE_INTERACTION
        if quantization is not None:
            encoder.model = weight_format().quantize(encoder.model, weight_format().resolve(quantization), source)
        return encoder.eval()

    def save_pretrained(self, folder: str | Path, layout: str = "sentence-transformers", tokenizer: Any = None) -> None:
        """Write a folder.

        Args:
            folder: made where missing.
            layout: whose: "sentence-transformers" (6 and later), "pylate" or "stanford".
            tokenizer: saved beside it. It also says which prompts are single tokens, as those of the settings'
                `prefixes` are; PyLate and Stanford's library put these before a text's ids.

        Raises:
            InputError: the layout cannot hold what this encoder has.
        """
        if layout not in LAYOUTS:
            raise InputError(f"layout is {shown(layout)}; choose one of {', '.join(LAYOUTS)}")
        folder = Path(folder)
        if layout == "sentence-transformers":
            self.model.save_pretrained(folder)
            self.save_layout(folder)
        else:
            known = {} if tokenizer is None else tokenizer.get_vocab()
            prefixes = {name: self._prefix(name, known) for name in ("query", "document")}
            if lacking := self._lacking(layout, prefixes):
                raise InputError(f"the layout of {layout} has no {lacking}; choose sentence-transformers")
            (self._save_for_pylate if layout == "pylate" else self._save_for_stanford)(folder, prefixes)
        if tokenizer is not None:
            if layout == "stanford" and tokenizer.pad_token == tokenizer.mask_token:
                # As PyLate sets it; Stanford's library would take the [MASK] of longer queries for padding.
                tokenizer = copy.deepcopy(tokenizer)
                tokenizer.pad_token = tokenizer.convert_ids_to_tokens(self.config.pad_token_id)
            tokenizer.save_pretrained(folder)

    def _prefix(self, name: str, known: Container[str]) -> str:
        """The single token that a prompt begins with, if it does."""
        prompt = self.settings.prompts.get(name, "")
        tokens = [prefix for prefix in self.settings.prefixes if prompt.startswith(prefix)]
        return max(tokens, key=len) if tokens else prompt if prompt and prompt in known else ""

    def _lacking(self, layout: str, prefixes: Mapping[str, str]) -> str:
        """What of the settings a layout of another library cannot hold."""
        settings, expansion = self.settings, self.settings.expansion
        if settings.pool_factor > 1:
            return "pool_factor"
        if expansion is not None and (not expansion.is_fixed or expansion.token is not None):
            return "query expansion that is not to a fixed length by [MASK]"
        if settings.similarity != "maxsim":
            return f"similarity {settings.similarity}"
        if settings.skipped_words and set(settings.skipped_in) != {"document"}:
            return f"words that are skipped in {listed(settings.skipped_in)}"
        if layout == "pylate":
            return ""
        if expansion is None:
            return "queries that are not made longer"
        if settings.skipped_words and set(settings.skipped_words) != set(string.punctuation):
            return "skipped words but punctuation"
        for name, prefix in prefixes.items():
            if not prefix or settings.prompts.get(name, "").rstrip() != prefix.rstrip():
                prompt = settings.prompts.get(name, "")
                return f"prompt {shown(prompt)} of a {name}, which must be one token (give the tokenizer)"
        return ""

    def save_layout(self, folder: Path) -> None:
        """Write all parts but the encoder, and what names them, for sentence-transformers."""
        settings = self.settings
        limits: dict[str, Any] = {"document_length": settings.document_length}
        limits |= {"query_length": settings.query_length, "max_seq_length": settings.max_length}
        kept = {name: value for name, value in limits.items() if value is not None}
        if settings.expansion is not None:
            kept["query_expansion"] = settings.expansion.to_dict()
        write_layout(folder, self._parts(), self._about(), kept)

    def _about(self) -> dict[str, Any]:
        settings = self.settings
        about = {"model_type": "MultiVectorEncoder", "prompts": settings.prompts}
        return about | {"default_prompt_name": settings.default_prompt_name, "similarity_fn_name": settings.similarity}

    def _parts(self) -> list[Part]:
        settings = self.settings
        layers = [dense_part(part, "token_embeddings") for part in self.after_tokens]
        mask = {"skiplist_words": list(settings.skipped_words), "skiplist_tasks": list(settings.skipped_in)}
        at = next((i for i, part in enumerate(self.after_tokens) if isinstance(part, Normalize)), len(layers))
        parts = [*layers[:at], Part(f"{_TYPES}{_MASK}", {**mask, "keep_only_token_ids": None}), *layers[at:]]
        if settings.pool_factor > 1:
            pooling: dict[str, Any] = {"pool_factor": settings.pool_factor}
            pooling |= {"num_protected_tokens": settings.protected_tokens}
            pooling |= {"normalize_embeddings": settings.pool_normalizes, "tasks": ["document"]}
            parts.append(Part(f"{_TYPES}{_POOLING}", pooling))
        return parts

    def _dense(self, layout: str) -> list[Dense]:
        dense = [part for part in self.after_tokens if isinstance(part, Dense)]
        if len(dense) + 1 != len(self.after_tokens) or not isinstance(self.after_tokens[-1], Normalize):
            raise InputError(f"the layout of {layout} has dense parts, then one normalisation, and nothing else")
        return dense

    def _save_for_pylate(self, folder: Path, prefixes: Mapping[str, str]) -> None:
        settings = self.settings
        longest = settings.max_length or self.config.max_position_embeddings
        expansion = settings.expansion or Expansion(settings.query_length or longest)
        # PyLate puts a prefix before all texts, and a prompt where its `prompt_name` is given.
        prompts = {n: text.removeprefix(prefixes.get(n, "")) for n, text in settings.prompts.items()}
        about: dict[str, Any] = {"prompts": prompts, "default_prompt_name": settings.default_prompt_name}
        about |= {"model_type": "ColBERT", "similarity_fn_name": "MaxSim"}
        about |= {f"{name}_prefix": prefix for name, prefix in prefixes.items()}
        about |= {"query_length": expansion.length, "document_length": settings.document_length or longest}
        about |= {"attend_to_expansion_tokens": expansion.attend, "skiplist_words": list(settings.skipped_words)}
        about["do_query_expansion"] = settings.expansion is not None
        parts = [
            part._replace(type="pylate.models.Dense.Dense", config=_without_names(part.config))
            for part in (dense_part(part, "") for part in self._dense("pylate"))
        ]
        limits = {"max_seq_length": settings.document_length or longest, "do_lower_case": False}
        self.model.save_pretrained(folder)
        write_layout(folder, parts, about, limits)

    def _save_for_stanford(self, folder: Path, prefixes: Mapping[str, str]) -> None:
        settings, dense = self.settings, self._dense("stanford")
        if len(dense) != 1 or dense[0].linear._parameters.get("bias") is not None or dense[0].activation != _IDENTITY:
            raise InputError("the layout of stanford has one projection without a bias or an activation")
        assert settings.expansion is not None
        longest = settings.max_length or self.config.max_position_embeddings
        self.model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        write_text(folder / "config.json", json.dumps(config | {"architectures": [STANFORD]}, indent=2) + "\n")
        saved = read_weights(weight_files(Source(folder)), lambda name: True)
        weights = {f"model.{name}": weight.clone() for name, weight in saved}
        write_weights(folder, weights | {"linear.weight": dense[0].linear.weight.detach()})
        metadata: dict[str, Any] = {"query_token_id": prefixes["query"], "doc_token_id": prefixes["document"]}
        metadata |= {"dim": self.width, "query_maxlen": settings.expansion.length}
        metadata["doc_maxlen"] = settings.document_length or longest
        metadata["attend_to_mask_tokens"] = settings.expansion.attend
        metadata["mask_punctuation"] = bool(settings.skipped_words)
        write_text(folder / _METADATA, json.dumps(metadata, indent=2) + "\n")


def _without_names(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("module_")}


def _settings(source: Source, contents: Contents) -> dict[str, Any]:
    """The settings of a folder of sentence-transformers or PyLate, but for those that parts of it hold."""
    about, body = contents.about, source.inside(contents.inner)
    known = {**settings_of(source, contents.inner, ("maxsim", "meanmaxsim", "MaxSim", "cosine", "dot"))}
    similarity, known["similarity"] = known.get("similarity"), "maxsim"
    if similarity == "meanmaxsim":
        known["similarity"] = similarity
    known.pop("truncate_dim", None)
    limits = body.read_json(TRANSFORMER_SETTINGS) if body.find(TRANSFORMER_SETTINGS) is not None else {}
    values: dict[str, Any] = {name: limits.get(name, about.get(name)) for name in ("query_length", "document_length")}
    prompts = dict(known.get("prompts", {}))
    prefixes = {name: about[f"{name}_prefix"] or "" for name in ("query", "document") if f"{name}_prefix" in about}
    for name, prefix in prefixes.items():
        prompts[name] = prefix + prompts.get(name, "").removeprefix(prefix)
    values["prefixes"] = tuple(filter(None, prefixes.values()))
    if "query_expansion" in limits or "query_expansion" in about:
        values["expansion"] = Expansion.of(limits.get("query_expansion", about.get("query_expansion")))
    elif prefixes or "do_query_expansion" in about or "skiplist_words" in about or about.get("model_type") == "ColBERT":
        if about.get("do_query_expansion") is not False:
            length, values["query_length"] = values["query_length"] or 32, None
            values["expansion"] = Expansion(length, attend=bool(about.get("attend_to_expansion_tokens")))
        # PyLate skips punctuation if nothing is said.
        words = about.get("skiplist_words")
        values["skipped_words"] = tuple(string.punctuation if words is None else words)
    return {**known, "prompts": prompts, **values}


def _stanford_settings(source: Source) -> dict[str, Any]:
    """The settings of Stanford's folders, with its own defaults."""
    metadata = source.read_json(_METADATA) if source.find(_METADATA) is not None else {}
    names = {"query": ("query_token_id", "[unused0]"), "document": ("doc_token_id", "[unused1]")}
    prefixes = {name: metadata.get(key) or usual for name, (key, usual) in names.items()}
    expansion = Expansion(metadata.get("query_maxlen") or 32, attend=bool(metadata.get("attend_to_mask_tokens")))
    return {
        "prompts": prefixes,  # the token alone: nothing parts it from a text's first token
        "prefixes": tuple(prefixes.values()),
        "document_length": metadata.get("doc_maxlen"),
        "expansion": expansion,
        "skipped_words": tuple(string.punctuation) if metadata.get("mask_punctuation", True) else (),
    }


def _stanford_layers(source: Source, model: ModernBertModel) -> list[nn.Module]:
    """The projection, which lies among the model's weights."""
    files, name = weight_files(source), "linear.weight"
    found = {key: shape for key, (_, shape, _) in weight_names(files).items()}
    if name not in found:
        raise CheckpointError(f"{source.folder or source.name_or_folder} has no projection, {name}")
    outputs, inputs = found[name]
    dense = Dense(inputs, outputs, bias=False, activation=_IDENTITY)
    dense.load_state_dict(dict(read_weights(files, lambda key: key == name)))
    return [dense.to(device=model.device, dtype=model.dtype), Normalize()]


@dataclasses.dataclass(frozen=True)
class PartlySeenPlan(SdpaPlan):
    """Also the tokens that are too far from all that is seen, if there are any: attention gives them zeros."""

    blind_T: Tensor | None = None


class PartlySeen(SdpaAttention):
    """Attention to the first tokens of each text alone, by all its tokens: what was added to a query is not seen.

    A token that has nothing within its reach gets zeros, as from PyTorch's attention, by which PyLate and
    sentence-transformers compute. Texts are attended whole, which is for short ones; their numbers do not depend on
    their batch.

    Args:
        seen: how many first tokens of each text are seen.
    """

    def __init__(self, seen: Sequence[int]) -> None:
        super().__init__()
        self.seen = seen

    def plan(self, packing: Packing, reach: Reach, dtype: torch.dtype) -> PartlySeenPlan:
        """Pieces of texts of the same length, rounded up, each with a mask."""
        groups: dict[int, list[int]] = {}
        for text, length in enumerate(packing.lengths):
            if length:
                groups.setdefault(-(-length // 16) * 16, []).append(text)
        pieces, layouts = [], []
        left, right = reach
        for width, texts in groups.items():
            layout = lay_out(texts, [width] * len(texts), packing)
            slots, held = torch.arange(width), layout.held.unflatten(0, (-1, width)).cpu()
            shown_NK = held & (slots < torch.tensor([self.seen[text] for text in texts])[:, None])
            ahead_QK = slots[None, :] - slots[:, None]
            near_QK = (ahead_QK >= -(width if left is None else left)) & (
                ahead_QK <= (width if right is None else right)
            )
            seen_NQK = shown_NK[:, None, :] & near_QK
            # What sees nothing within its reach, as slots without a token, sees all that is shown: on some devices its
            # numbers were NaN otherwise.
            seen_NQK |= ~seen_NQK.any(2, keepdim=True) & shown_NK[:, None, :]
            bias = torch.zeros(seen_NQK.shape, dtype=dtype).masked_fill_(~seen_NQK, float("-inf"))
            pieces.append(Piece(width, False, bias[:, None].to(layout.held.device)))
            layouts.append(layout)
        sizes = [len(layout.tokens) for layout in layouts]
        return PartlySeenPlan(pieces, sizes, *way(layouts, packing), self._blind(packing, left))

    def _blind(self, packing: Packing, left: int | None) -> Tensor | None:
        """Whether each token is farther behind all that is seen of its text than it sees."""
        spans = zip(packing.lengths, self.seen, strict=True)
        if left is None or all(length <= seen + left for length, seen in spans):
            return None
        parts = [torch.arange(length) >= seen + left for length, seen in zip(packing.lengths, self.seen, strict=True)]
        return torch.cat(parts).to(packing.positions_T.device)

    def attend(self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, plan: SdpaPlan, dropout: float = 0.0) -> Tensor:
        out_THD = super().attend(q_THD, k_THD, v_THD, plan, dropout)
        blind_T = plan.blind_T if isinstance(plan, PartlySeenPlan) else None
        return out_THD if blind_T is None else out_THD.masked_fill(blind_T[:, None, None], 0)
