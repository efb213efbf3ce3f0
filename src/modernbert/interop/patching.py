"""Models of transformers that compute with ours: `patch` and `unpatch`.

A patched model keeps its class's name, its parameters and its outputs. Beside it there is a model of this package that
holds the same parameters, one copy of the weights; the forward of the object hands over to that. While the weights lie
in the layout of kernels, both models' modules are guarded by one object: whatever else is asked of a weight first gets
the exact numbers back. What our model cannot compute, the object's own code computes as before.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import sys
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernbert.config import Config
from modernbert.engines.guard import LOCK, Frozen, FrozenWeight
from modernbert.errors import InputError, PatchError, listed
from modernbert.interop.encoders import is_encoder, patch_encoder
from modernbert.interop.replacing import CPU_TOKENS, LINK, Replaced, reads_padding, replace_class, row_groups, zeros
from modernbert.models import decoder, encoder, heads
from modernbert.models.base import PreTrainedModel
from modernbert.models.placement import warn_once
from modernbert.nn.packing import PackedInputs
from modernbert.retrieval.multi_vector import PartlySeen

logger = logging.getLogger(__name__)

ObjT = TypeVar("ObjT")

_HOME = "transformers.models.modernbert"  # what the modules of both architectures begin with
# What a user may set in a configuration of theirs later, and acts on every call.
_FOLLOWED = ("problem_type", "classifier_pooling", "pad_token_id")
# What weights may lie in; anything else (quantized, adapted, parametrized) computes something of its own.
_PLAIN = {nn.Linear, nn.Embedding, nn.LayerNorm}
_OF_GENERATE = {
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "length_penalty", "early_stopping"),
    *("num_return_sequences", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "use_cache", "do_sample", "forced_eos_token_id"),
}
_CLASSES: dict[str, Any] = {
    name: cls
    for module in (encoder, heads, decoder)
    for name, cls in vars(module).items()
    if name.startswith("ModernBert") and isinstance(cls, type) and hasattr(cls, "forward")
}
# Results with a value for each token: those of every class, and logits of some.
_BY_TOKEN = {"last_hidden_state", "start_logits", "end_logits"}
_TOKEN_LOGITS = (heads.ModernBertForMaskedLM, heads.ModernBertForTokenClassification)
_SAMPLES = {"temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}


class PatchedModel(Replaced):
    """Goes before the class of a patched model."""

    def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        link: Link = self.__dict__[LINK]
        return _uncompiled(link, self, args, kwargs)

    def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        link: Link = self.__dict__[LINK]
        return link.generate(self, args, kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "training" and value and "_frozen" in self.__dict__:
            self.__dict__["_frozen"].thaw("training mode was set")
        super().__setattr__(name, value)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled(link: Link, theirs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return link.forward(theirs, args, kwargs)


# A model of theirs and ours


class Link:
    """A model of theirs, and the one of ours that computes for it.

    Attributes:
        ours: holds the same parameters.
        inner: the link of a backbone within a model with a head; its model is a part of `ours`.
    """

    def __init__(self, theirs: Any, ours: PreTrainedModel, outer: Link | None = None) -> None:
        self._theirs = weakref.ref(theirs)
        self.ours, self.outer = ours, outer
        self.inner: Link | None = None
        self.arguments = inspect.signature(type(theirs).forward)
        self.taken = {*inspect.signature(type(ours).forward).parameters} - {"self", "kwargs"}
        self.counts_labels = "loss_function" in inspect.unwrap(type(theirs).forward).__code__.co_names
        self._passes, self._wait = 0, 1  # passes since a thaw, and after how many the weights are laid out again
        self._running = 0  # passes that run now, of all threads

    @property
    def frozen(self) -> Frozen | None:
        """What holds the weights, while they lie in the layout of kernels."""
        frozen: Frozen | None = self.ours.__dict__.get("_frozen")
        return frozen

    # Weights

    def is_in_step(self, theirs: Any) -> str:
        """Why their own code must compute; empty where ours can. Called where the weights are not laid out."""
        for name, module in theirs.named_modules():
            if module is not theirs and (listener := _listener(module)):
                return f"{name} has {listener}"
        held, mine = _parameters(theirs), _parameters(self.ours)
        if held.keys() != mine.keys() or any(held[name] is not mine[name] for name in held):
            if self.outer is not None:
                return "the model was changed since it was patched"
            try:
                self.ours = counterpart(theirs)
            except PatchError as error:
                return f"the model was changed since it was patched: {error}"
            if self.inner is not None:
                self.inner.ours = self.ours.base_model
        return ""

    def freeze(self, theirs: Any) -> None:
        """Lay out the weights for kernels, and guard their modules as ours are."""
        with LOCK:
            if self.frozen is not None:
                return
            self.ours.optimize_for_inference()
            frozen: Frozen = self.ours.__dict__["_frozen"]
            mine = dict(self.ours.named_modules())
            for name, module in list(theirs.named_modules()):
                if isinstance(module, PatchedModel):
                    frozen.watch(module)
                else:  # a part that computes by itself serves in its place as well
                    serve = mine[name].__dict__.get("_serve") if name in mine else None
                    frozen.guard(module, serve, hold=False)
            with torch._C.DisableTorchFunctionSubclass():  # whoever collects what trains must find it
                for parameter in frozen._parameters:
                    parameter.requires_grad_(parameter.trains)
                for switched in frozen._switched:
                    switched.requires_grad_(True)

    def thaw(self) -> None:
        """Give their modules the weights back."""
        self.ours.thaw()

    # Computing

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """A pass: while others run as well, weights are not laid out, since those may compute with them."""
        outermost = self.outer or self
        with LOCK:
            outermost._running += 1
        try:
            yield
        finally:
            with LOCK:
                outermost._running -= 1

    def forward(self, theirs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the patched forward returns."""
        with self._counted():
            given = self._given(theirs, args, kwargs)
            why = given if isinstance(given, str) else ""
            if not why and self.frozen is None:
                with LOCK:
                    why = self.is_in_step(theirs)
            if isinstance(given, str) or why:
                warn_once(f"{type(theirs).__name__} is computed by transformers' own code: {why}")
                return type(theirs).plain.forward(theirs, *args, **kwargs)
            self._prepare(theirs, given)
            options = {name: given.pop(name) for name in ("return_dict", "past_key_values") if name in given}
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.frozen is None):
                output = self._run(theirs, given, options.get("past_key_values"))
            return output if options["return_dict"] else output.to_tuple()

    def _given(self, theirs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | str:
        """The arguments of a call for our forward, or why ours cannot compute it."""
        if torch._C._is_tracing() or torch.compiler.is_exporting():
            raise InputError(
                f"a patched {type(theirs).__name__} cannot be traced or exported: its weights lie in the layout of "
                "kernels; call modernbert.unpatch on it first"
            )
        if torch._C._functorch.peek_interpreter_stack() or torch._C._len_torch_dispatch_stack() > 0:
            return "it runs in a mode or transform of PyTorch"
        try:
            bound = self.arguments.bind(theirs, *args, **kwargs).arguments
        except TypeError:
            return "an argument is given that it refuses"
        given = {name: value for name, value in bound.items() if value is not None}
        given.pop(next(iter(self.arguments.parameters)))
        for parameter in self.arguments.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= {k: v for k, v in given.pop(parameter.name, {}).items() if v is not None}
        for name in ("token_type_ids", "num_logits_to_keep", "cache_position", "seq_idx"):
            if name != "num_logits_to_keep" or not given.get(name):
                given.pop(name, None)
        if not self.counts_labels:  # their loss is a mean, or they have none
            given.pop("num_items_in_batch", None)
        config = theirs.config
        for name in ("output_attentions", "output_hidden_states"):
            given.setdefault(name, bool(getattr(config, name, False)))
        named = given.pop("return_dict", None)
        given["return_dict"] = bool(getattr(config, "return_dict", True) if named is None else named)
        flat = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
        if unknown := given.keys() - self.taken - flat - {"return_dict"}:
            return f"the argument {listed(sorted(unknown))} is given"
        ids, mask = given.get("input_ids", given.get("inputs_embeds")), given.get("attention_mask")
        if not isinstance(ids, Tensor) or ("input_ids" in given) == ("inputs_embeds" in given):
            return "not one of input_ids and inputs_embeds is given"
        grid = tuple(ids.shape if "input_ids" in given else ids.shape[:-1])
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == len(grid)):
            return f"attention_mask is no tensor of shape {grid}"
        pad = getattr(config, "pad_token_id", None)
        whole = mask is not None and "input_ids" in given and mask.shape == ids.shape
        hides = whole and reads_padding.get() and pad is not None and bool(((mask == 0) & (ids != pad)).any())
        # Late interaction reads the states of such tokens, which attend and are not attended to.
        if hides and (why := self._reads_hidden(theirs, given, pad)):
            return f"attention_mask hides tokens that are no padding (pad_token_id {pad}), {why}"
        if given["output_hidden_states"] and _version() < 5:
            return "transformers below 5 shows the last hidden state without its norm"
        if mask is None and "position_ids" in given and "past_key_values" not in self.taken and not flat & given.keys():
            given["attention_mask"] = torch.ones(grid, dtype=torch.bool, device=ids.device)  # each row is one text
        return given

    def _reads_hidden(self, theirs: Any, given: dict[str, Any], pad: Any) -> str:
        """Let tokens that nobody sees be computed after those that all see; why ours cannot, empty where it can."""
        mask, ids = given["attention_mask"] != 0, given["input_ids"]
        others = {name for name in given if given[name] is not False} - {"input_ids", "attention_mask", "return_dict"}
        if not isinstance(self.ours, encoder.ModernBertModel) or mask.dim() != 2 or others:
            return "and more than the last states are wanted"
        seen, places = mask.sum(1), torch.arange(mask.shape[1], device=mask.device)
        lengths = ((mask | (ids != pad)) * (places + 1)).amax(1)
        if not bool((mask == (places < seen[:, None])).all()) or not bool(seen.all()):
            return "and they are not behind those that are seen"
        reach = self.ours.config.local_attention // 2
        zeros_there = _version() >= 5 and theirs.config._attn_implementation == "sdpa"
        if not zeros_there and bool((lengths > seen + reach).any()):
            return "and some are too far from all that is seen"
        given["seen"], given["lengths"] = seen.tolist(), lengths.tolist()
        return ""

    def _prepare(self, theirs: Any, given: Mapping[str, Any]) -> None:
        """Bring our model into the state of theirs."""
        ours, outermost = self.ours, self.outer or self
        for name in _FOLLOWED:
            value = getattr(theirs.config, name, None)
            if hasattr(ours.config, name) and getattr(ours.config, name) != value:
                setattr(ours.config, name, value)
        if self.frozen is not None:
            vectors = given.get("inputs_embeds")
            wanted = {"labels", "start_positions"} & given.keys() or (vectors is not None and vectors.requires_grad)
            if torch.is_grad_enabled() and wanted:
                ours.thaw()  # a loss or vectors whose gradient may be wanted
            return
        if ours.training != theirs.training or ours.base_model.training != theirs.training:
            ours.train(theirs.training)
        recomputes = any(getattr(module, "gradient_checkpointing", False) for module in theirs.modules())
        if recomputes != ours.base_model.is_gradient_checkpointing:
            (ours.gradient_checkpointing_enable if recomputes else ours.gradient_checkpointing_disable)()
        device, whole = next(theirs.parameters()).device.type, outermost._theirs()
        if theirs.training or torch.is_grad_enabled() or torch.is_autocast_enabled(device):
            return
        with LOCK:
            outermost._passes += 1
            if outermost._passes >= outermost._wait and outermost._running == 1 and whole is not None:
                outermost._passes, outermost._wait = 0, outermost._wait * 2  # who thaws often waits longer and longer
                if outermost is self or not outermost.is_in_step(whole):
                    outermost.freeze(whole)

    def _run(self, theirs: Any, given: dict[str, Any], cache: Any) -> Any:
        ours, outputs = self.ours, sys.modules["transformers.modeling_outputs"]
        if "seen" in given:
            return self._run_partly_seen(given, outputs)
        caches = "past_key_values" in self.taken
        if caches:
            wanted = given.pop("use_cache", None)
            wanted = getattr(theirs.config, "use_cache", False) if wanted is None else wanted
            if cache is None and wanted and not theirs.training:
                cache = _new_cache(theirs.config)
            given |= {"use_cache": cache is not None, "past_key_values": cache}
        if self.frozen is not None and not caches and self._divides(given):
            return self._run_in_turn(given, outputs)
        output = ours(**given, return_dict=True)
        fields = dict(output.items())
        if caches:
            fields["past_key_values"] = cache
        return getattr(outputs, type(output).__name__)(**fields)

    def _run_partly_seen(self, given: Mapping[str, Any], outputs: Any) -> Any:
        """Rows whose last tokens nobody sees, as those that make queries of late interaction longer."""
        ids, body = given["input_ids"], self.ours
        assert isinstance(body, encoder.ModernBertModel)
        lengths = given["lengths"]
        rows = [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
        packed = PackedInputs.of_rows(rows, ids.device)
        states_TM = body.encode(packed, backend=PartlySeen(given["seen"])).last_TM
        held = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
        states = states_TM.new_zeros(ids.numel(), states_TM.shape[-1])
        at = held.flatten().nonzero().squeeze(1).to(ids.device)
        states = states.index_copy(0, at, states_TM).unflatten(0, tuple(ids.shape))
        return outputs.BaseModelOutput(last_hidden_state=states)

    def _run_in_turn(self, given: Mapping[str, Any], outputs: Any) -> Any:
        """A padded batch, a few of its texts at a time: what a pass takes fits into caches."""
        mask = given["attention_mask"] != 0
        rows, columns = mask.shape
        options = {name: value for name, value in given.items() if not isinstance(value, Tensor)}
        tokens = {
            name: value.expand(rows, *value.shape[1:]) if value.dim() > 1 else value.expand(rows, columns)
            for name, value in given.items()
            if name in ("input_ids", "inputs_embeds", "position_ids")
        }
        by_token = _BY_TOKEN | ({"logits"} if isinstance(self.ours, _TOKEN_LOGITS) else set())
        whole: dict[str, Tensor] = {}
        for group in row_groups(mask.sum(1).tolist(), CPU_TOKENS):
            real = mask[group]
            at = real.flatten().nonzero().squeeze(1) + group.start * columns
            part = {name: value[group][real] for name, value in tokens.items()}
            output = self.ours(**part, **options, cu_seqlens=F.pad(real.sum(1).cumsum(0), (1, 0)), return_dict=True)
            for name, values in output.items():
                if name not in whole and name in ("start_logits", "end_logits"):
                    whole[name] = values.new_full((rows * columns,), torch.finfo(values.dtype).min)
                elif name not in whole:
                    whole[name] = zeros((rows * columns if name in by_token else rows, *values.shape[1:]), values)
                if name in by_token:
                    whole[name].index_copy_(0, at, values)
                else:
                    whole[name][group] = values
        fields = {name: x.unflatten(0, (rows, columns)) if name in by_token else x for name, x in whole.items()}
        return getattr(outputs, type(output).__name__)(**fields)

    def _divides(self, given: Mapping[str, Any]) -> bool:
        """Whether the rows of a batch are computed in turn."""
        mask = given.get("attention_mask")
        if (
            mask is None
            or self.ours.device.type != "cpu"
            or given["output_attentions"]
            or given["output_hidden_states"]
        ):
            return False
        whole = {"labels", "start_positions", "end_positions", "cu_seqlens", "cu_seq_lens_q", "indices", "num_choices"}
        return not whole & given.keys() and mask.dim() == 2 and len(mask) > 1 and int((mask != 0).sum()) > CPU_TOKENS

    def generate(self, theirs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What their `generate` returns: by ours where it is greedy or by beams, else by theirs over our passes."""
        options = self._generation(theirs, args, kwargs)
        if options is None:
            return type(theirs).plain.generate(theirs, *args, **kwargs)
        with self._counted(), torch.no_grad():
            self._prepare(theirs, {})
            generating: Any = self.ours
            return generating.generate(**options)

    def _generation(self, theirs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        given = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
        ids = given.pop("inputs", None)
        ids = given.pop("input_ids", None) if ids is None else ids
        mask, config = given.pop("attention_mask", None), given.pop("generation_config", None)
        if theirs.training or not isinstance(ids, Tensor) or ids.dim() != 2 or self.is_in_step_or_frozen(theirs):
            return None
        # Theirs knows how what is given, the given configuration and the model's own go together.
        config, others = theirs._prepare_generation_config(config, **given)
        usual: dict[str, Any] = getattr(config, "_get_default_generation_params", dict)()
        chosen = {name: value for name, value in config.to_diff_dict().items() if value != usual.get(name)}
        for name in ("transformers_version", "_from_model_config", *(() if chosen.get("do_sample") else _SAMPLES)):
            chosen.pop(name, None)
        chosen = {k: v for k, v in chosen.items() if v is not None and (k in _OF_GENERATE or v is not False)}
        unknown = any(value is not None for value in others.values()) or chosen.keys() - _OF_GENERATE
        if unknown or chosen.get("do_sample") or chosen.get("use_cache") is False:
            return None
        if type(self.ours).__name__ != type(theirs).__name__ or chosen.get("early_stopping") not in (None, True, False):
            return None
        for name in ("do_sample", "bos_token_id"):  # prompts begin texts
            chosen.pop(name, None)
        ends, pad = config.eos_token_id, config.pad_token_id
        ends = [] if ends is None else torch.as_tensor(ends).flatten().tolist()
        if mask is None:
            mask = torch.ones_like(ids) if pad is None or pad in ends else ids != pad
            mask |= ~mask.any(1, keepdim=True)
        if not isinstance(mask, Tensor) or mask.shape != ids.shape or not bool((mask != 0).any(1).all()):
            return None
        chosen |= {"eos_token_id": ends, "pad_token_id": next(iter(ends), 0) if pad is None else pad}
        return {"input_ids": ids, "attention_mask": mask, **chosen}

    def is_in_step_or_frozen(self, theirs: Any) -> bool:
        """Whether their code must generate."""
        return self.frozen is None and bool(self.is_in_step(theirs))


def _new_cache(config: Any) -> Any:
    """A cache as transformers makes one."""
    kind = sys.modules["transformers"].DynamicCache
    return kind(config=config) if "config" in inspect.signature(kind.__init__).parameters else kind()


def _version() -> int:
    return int(sys.modules["transformers"].__version__.split(".")[0])


# From theirs to ours


def _class_of(module: nn.Module) -> type[PreTrainedModel] | None:
    """Our class for one of transformers', or for a subclass with the same forward."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith(_HOME) and cls.__name__ in _CLASSES:
            same = getattr(type(module), "forward", None) is cls.__dict__.get("forward")
            return _CLASSES[cls.__name__] if same else None
    return None


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def _listener(module: nn.Module) -> str:
    """What waits for a module to be called, or replaces its forward; empty where nothing does."""
    if "forward" in module.__dict__:
        return "a forward of its own"
    hooks = [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks]
    found = [hook for kind in hooks for hook in kind.values()]
    # Those of transformers itself record what the model returns, or let vectors have a gradient, as ours does anyway.
    mine = all((getattr(hook, "__module__", "") or "").startswith("transformers.") for hook in found)
    return "" if mine else "hooks"


def counterpart(theirs: Any) -> PreTrainedModel:
    """Our model of the configuration, the class and the very parameters of theirs.

    Raises:
        PatchError: ours cannot be that.
    """
    cls, name = _class_of(theirs), type(theirs).__name__
    assert cls is not None
    if getattr(theirs, "_compiled_call_impl", None) is not None:
        raise PatchError(f"{name} is compiled by torch.compile; patch it instead, without compiling it")
    if getattr(theirs, "is_quantized", False) or getattr(theirs, "hf_quantizer", None) is not None:
        raise PatchError(f"{name} is quantized; load it in floats, or quantized with modernbert.quantize")
    for path, module in theirs.named_modules():
        kind = type(module).__module__.partition(".")[0]
        if kind == "peft":
            raise PatchError(f"{path} is an adapter of PEFT; merge it first: model = model.merge_and_unload()")
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if own and type(module) not in _PLAIN and not isinstance(module, Replaced):
            kind = type(module).__name__
            raise PatchError(f"{path} is a {kind}; weights must be in Linear, Embedding and LayerNorm of torch.nn")
        if any(type(parameter) not in (nn.Parameter, FrozenWeight) for parameter in own):
            raise PatchError(f"{path} holds a {type(own[0]).__name__}; weights must be plain parameters")
        if module is not theirs and (listener := _listener(module)):
            raise PatchError(f"{path} has {listener}; parts of a patched model are not called")
    if "forward" in theirs.__dict__:
        raise PatchError(f"{name} has a forward of its own, such as one of accelerate; remove that first")
    values = {key: value for key, value in theirs.config.to_dict().items() if key != "quantization_config"}
    held, embedding = _parameters(theirs), theirs.get_input_embeddings().weight
    if any(parameter.device.type == "meta" for parameter in held.values()):
        raise PatchError(f"{name} has weights on the meta device; load it whole onto one device")
    if len({(parameter.device, parameter.dtype) for parameter in held.values()}) > 1:
        raise PatchError(f"{name} has weights of several dtypes or devices; move it as a whole: model.to(...)")
    output = theirs.get_output_embeddings()
    changes: dict[str, Any] = {
        "tie_word_embeddings": output is None or output.weight is embedding,
        "reference_compile": None,
    }
    changes["vocab_size"] = len(embedding)
    if hasattr(cls.config_class, "repad_logits_with_grad"):
        changes["repad_logits_with_grad"] = True
    try:
        config: Config = cls.config_class.from_dict(values | changes)
        with torch.device("meta"):
            ours = cls(config)
    except (ValueError, TypeError) as error:
        raise PatchError(f"{name} has a configuration that is not served: {error}") from error
    wanted = _parameters(ours)
    if different := sorted(held.keys() ^ wanted.keys()):
        raise PatchError(f"{name} has other weights than its class: {listed(different)}")
    if shapes := [key for key in wanted if wanted[key].shape != held[key].shape]:
        raise PatchError(f"{name} has weights of other shapes than its configuration says: {listed(shapes)}")
    for key, parameter in held.items():
        owner, _, leaf = key.rpartition(".")
        ours.get_submodule(owner)._parameters[leaf] = parameter
    ours.name_or_path = str(getattr(theirs, "name_or_path", ""))
    return ours.train(theirs.training)


@torch.no_grad()
def _compare(theirs: Any, ours: PreTrainedModel) -> None:
    """Refuse a model whose parts compute something else than ours do, by a short text.

    Raises:
        PatchError: the states differ by more than rounding.
    """
    body, mine = (theirs.base_model, ours.base_model)
    ids = torch.arange(160, device=mine.device)[None] % mine.config.vocab_size
    was = {module: module.training for module in (*body.modules(), *mine.modules())}
    try:
        for module in was:
            module.training = False
        with torch.autocast(mine.device.type, enabled=False):
            expected, found = (
                model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state.float() for model in (body, mine)
            )
    finally:
        for module, training in was.items():
            module.training = training
    off = float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-6))
    if not off < (1e-3 if mine.dtype in (torch.float32, torch.float64) else 0.2):
        raise PatchError(
            f"{type(theirs).__name__} computes other states than its configuration says (by {off:.1%} of the largest)"
        )


def models_in(thing: Any) -> Iterator[nn.Module]:
    """Every module of an object, and of what it keeps as attributes where it is none itself."""
    seen: set[int] = set()
    roots = [thing] if isinstance(thing, nn.Module) else list(getattr(thing, "__dict__", {}).values())
    for root in roots:
        for module in root.modules() if isinstance(root, nn.Module) else ():
            if id(module) not in seen:
                seen.add(id(module))
                yield module


def links_in(thing: Any) -> list[tuple[Any, Link]]:
    """The patched models of an object that are no part of others."""
    found = [(m, m.__dict__[LINK]) for m in models_in(thing) if isinstance(m, PatchedModel)]
    return [(model, link) for model, link in found if link.outer is None]


def _find(thing: Any) -> list[Any]:
    """The models of transformers in an object, without those that are parts of others.

    Of several heads over one model only the first counts; the others' own code computes them over the patched model.
    """
    found, inside = [], set[int]()
    for module in models_in(thing):
        kind = type(module)
        if kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch."):
            raise PatchError("the model is compiled by torch.compile; patch what it was made of instead")
        if id(module) in inside or isinstance(module, Replaced) or _class_of(module) is None:
            continue
        body: Any = module.base_model
        if id(body) not in inside and not isinstance(body, Replaced):
            found.append(module)
            inside |= {id(part) for part in module.modules()}
    return found


def patch(obj: ObjT) -> ObjT:
    """Let the ModernBERT models in an object compute without padding, by this package's kernels, in place.

    The object keeps its class's name, its methods, its weights (there is no second copy) and the shapes of what it
    returns. Padding comes back as zeros. In evaluation mode the weights lie in the layout of kernels from now on, as
    after `optimize_for_inference`; whatever asks for them gets the exact numbers. In training mode texts are packed as
    well, and gradients reach the object's own parameters. What ours does not compute (hooks on inner modules, unknown
    arguments, traces), the object's own code computes, with one line of log.

    Args:
        obj: a model of transformers (ModernBert and ModernBertDecoder, 4.48 and later), a `SentenceTransformer`,
            `CrossEncoder`, `SparseEncoder` or `MultiVectorEncoder` of sentence-transformers 5 and 6, a `ColBERT` of
            PyLate, or anything that holds such models: a SetFit model, GLiNER, a pipeline, an `nn.Module`. Patching
            twice changes nothing more.

    Returns:
        The object.

    Raises:
        PatchError: it holds no such model, or one that cannot be patched; the message says why, and nothing is changed.
    """
    found = _find(obj)
    if not found and not any(isinstance(module, PatchedModel) for module in models_in(obj)):
        raise PatchError(
            f"a {type(obj).__name__} holds no ModernBert or ModernBertDecoder model of transformers"
            + (" (it is one of this package: call optimize_for_inference())" if _is_ours(obj) else "")
        )
    made = []
    for theirs in found:
        ours = counterpart(theirs)
        _refuse_shared(obj, theirs)
        _compare(theirs, ours)
        made.append((theirs, ours))
    for theirs, ours in made:
        link = Link(theirs, ours)
        if (body := theirs.base_model) is not theirs:
            link.inner = Link(body, ours.base_model, link)
            _put(body, link.inner)
        _put(theirs, link)
        if not theirs.training:
            link.freeze(theirs)
        how = _engine_of(ours)
        logger.info("patched a %s: %s parameters, %s", type(theirs).__name__, f"{ours.num_parameters():,}", how)
    for module in list(models_in(obj)):
        if is_encoder(module):
            patch_encoder(module)
    return obj


def _put(theirs: Any, link: Link) -> None:
    theirs.__dict__[LINK] = link
    replace_class(theirs, PatchedModel, ("forward", "generate") if hasattr(link.ours, "generate") else ("forward",))


def _engine_of(ours: PreTrainedModel) -> str:
    frozen: Frozen | None = ours.__dict__.get("_frozen")
    layers = None if frozen is None else frozen.layers
    if layers is not None:
        return f"by {type(layers).__name__}"
    return "packed, module by module" if frozen is not None else "packed, in training mode"


def _is_ours(obj: Any) -> bool:
    return any(isinstance(module, PreTrainedModel) for module in models_in(obj))


def _refuse_shared(obj: Any, theirs: nn.Module) -> None:
    """Refuse a model whose weights a module outside of it computes with; raises `PatchError`."""
    held, parts = {id(parameter) for parameter in theirs.parameters()}, {id(part) for part in theirs.modules()}
    for module in models_in(obj):
        shared = any(id(parameter) in held for parameter in module._parameters.values() if parameter is not None)
        if shared and id(module) not in parts:
            raise PatchError(f"a {type(module).__name__} outside of the {type(theirs).__name__} shares its weights")


def unpatch(obj: ObjT) -> ObjT:
    """Undo `patch`: the object has its own class, parameters and code again, and computes the bits of before.

    Returns:
        The object.

    Raises:
        PatchError: nothing in it is patched.
    """
    replaced = [module for module in models_in(obj) if isinstance(module, Replaced)]
    if not replaced:
        raise PatchError(f"a {type(obj).__name__} holds nothing that is patched")
    for module in replaced:
        if isinstance(module, PatchedModel):
            module.__dict__[LINK].thaw()
    for module in replaced:
        module.__dict__.pop(LINK, None)
        object.__setattr__(module, "__class__", type(module).plain)
    return obj
