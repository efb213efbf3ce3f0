"""Low-rank adapters (LoRA, DoRA) at inference, from the folders that PEFT saves: several by name on one model.

What an adapter changes is two kinds of things. A linear layer that gets a low-rank addition changes its class for as
long as the adapter is active, and keeps its weight and the weight's name; a parameter that has a value of the
adapter's own, such as a classifier's weight, is exchanged for it. Undoing either gives the base's bits again.

Shapes: T rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from modernbert.engines.freeze import FloatLinear, register_linear
from modernbert.engines.guard import LOCK, is_frozen, thaw
from modernbert.errors import CheckpointError, InputError, listed, printable, shown
from modernbert.io.checkpoint import read_weights, weight_names
from modernbert.io.hub import ADAPTER, Source
from modernbert.nn.layers import Linear
from modernbert.nn.linear import linear

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
_OFF: tuple[Any, ...] = (None, False, "none", {}, [])  # what switches a field of adapter_config.json off
# The fields that are read here; which layers have an addition, the tensors' names say.
_READ = {
    *("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias"),
    *("bias", "modules_to_save", "init_lora_weights", "base_model_name_or_path", "revision"),
}
# Those that change nothing once an adapter is trained, or that the tensors' names make plain.
_IDLE = {
    *("task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "qalora_group_size"),
    *("megatron_core", "runtime_config", "eva_config", "ensure_weight_tying"),
}
# Other ways to initialize change the base's weights, too.
_INITIALIZED = (True, False, "gaussian", "eva", "orthogonal")
_LOW_RANK = re.compile(r"(.+)\.lora_(A|B|magnitude_vector)(?:\.(?!weight$|bias$)[^.]+)?(?:\.(weight|bias))?")
_WRAPPERS = re.compile(r"\.modules_to_save(?:\.[^.]+(?=\.))?|\.base_layer")
_ROWS = 256  # whose products are added at once
_REPEATED = re.compile(r"\)\s*[*+{]")  # of such patterns, some never end
_HEADS = ("head.", "lm_head.", "decoder.", "classifier.")

AdapterSource = str | Path | Source


@dataclasses.dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a linear layer's product: B (A x), scaled.

    Attributes:
        a_RI, b_OR: in float32 or wider, as PEFT computes with them.
        scale: of the product.
        bias_O: added to B's product, and scaled too.
        magnitude_O: of DoRA, the lengths that the rows of the changed weight have.
        factor_O: of DoRA, what makes them so; known where the layer's weight is.
    """

    a_RI: Tensor
    b_OR: Tensor
    scale: float
    bias_O: Tensor | None = None
    magnitude_O: Tensor | None = None
    factor_O: Tensor | None = None

    def moved(self, device: torch.device) -> LowRank:
        """The same on another device."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **moved)

    def on(self, module: Any) -> LowRank:
        """The same, ready for a layer, whose weight may be quantized."""
        weight = module.weight.detach()
        here = self.moved(weight.device)
        if here.magnitude_O is None:
            return here
        length_O = torch.linalg.vector_norm(weight.to(here.a_RI.dtype) + here.change(), dim=1)
        return dataclasses.replace(here, factor_O=here.magnitude_O / length_O)

    def change(self) -> Tensor:
        """What the weight changes by, (O, I)."""
        return (self.b_OR @ self.a_RI) * self.scale

    def added(self, x: Tensor, out: Tensor, bias_O: Tensor | None) -> Tensor:
        """What to add to the layer's product `out` of (T, I), which had that bias: (T, O)."""
        dtype = torch.promote_types(x.dtype, self.a_RI.dtype)
        low_TR = linear(x.to(dtype), self.a_RI.to(dtype)) * self.scale
        more = linear(low_TR, self.b_OR.to(dtype), None if self.bias_O is None else self.bias_O * self.scale)
        if self.factor_O is None:
            return more
        out = out.to(dtype) if bias_O is None else out.to(dtype) - bias_O
        return (self.factor_O - 1) * out + self.factor_O * more

    def into(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the addition in them, in the dtype of A."""
        weight_OI = weight_OI.to(self.a_RI.dtype) + self.change()
        more = None if self.bias_O is None else self.bias_O * self.scale
        if self.factor_O is not None:
            weight_OI = self.factor_O[:, None] * weight_OI
            more = None if more is None else self.factor_O * more
        return weight_OI, bias_O if more is None or bias_O is None else bias_O + more


def _with_additions(low: Sequence[LowRank], bias_O: Tensor | None, x: Tensor, out: Tensor) -> Tensor:
    """A layer's product and all additions to it, each row independent of the others.

    Without gradients on a CPU it is done in place, some rows after others: what is added then stays in the caches.
    """

    def add(x: Tensor, out: Tensor) -> Tensor:
        total = out
        for one in low:
            total = total + one.added(x, out, bias_O)
        return total.to(out.dtype)

    wants_grad = torch.is_grad_enabled() and (x.requires_grad or out.requires_grad)
    if wants_grad or x.dim() != 2 or len(x) <= _ROWS or x.device.type != "cpu" or torch.compiler.is_compiling():
        return add(x, out)
    for some_x, some in zip(x.split(_ROWS), out.split(_ROWS), strict=True):
        some.copy_(add(some_x, some))
    return out


class Adapted(nn.Module):
    """Goes before the class of a linear layer while adapters add to its product; its parameters stay as they are."""

    plain: ClassVar[type[nn.Module]]  # the class of the layer otherwise
    low: tuple[LowRank, ...]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)  # of the class behind this one
        return _with_additions(self.low, self._parameters.get("bias"), x, out)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        device = fn(self.low[0].a_RI[:0]).device
        self.low = tuple(one.moved(device) for one in self.low)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:  # the class is made here, and has no name to be found by
        return _blank, (self.plain,), self.__getstate__()


class _AdaptedKind(FloatLinear):
    """How adapted layers are frozen: one by one, the base's product by kernels and the additions after it."""

    in_engine = False

    def served(self, module: Any, multiply: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        bias = module._parameters.get("bias")
        add = functools.partial(_with_additions, module.low, None if bias is None else bias.data)
        return lambda x: add(x, multiply(x))


_ADAPTED: dict[type[nn.Module], type[Adapted]] = {}


def _adapted(plain: type[nn.Module]) -> type[Adapted]:
    """The adapted class of a layer's class."""
    if plain not in _ADAPTED:
        own = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
        _ADAPTED[plain] = type(plain.__name__, (Adapted, plain), {**own, "plain": plain})
        if plain is Linear:
            register_linear(_ADAPTED[plain], _AdaptedKind())
    return _ADAPTED[plain]


def _blank(plain: type[nn.Module]) -> nn.Module:
    made = _adapted(plain)
    blank: nn.Module = made.__new__(made)
    return blank


# Folders


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter that fits a model: additions by the names of layers, values by the names of parameters."""

    low: Mapping[str, LowRank]
    values: Mapping[str, Tensor]


class AdapterFolder:
    """A folder or repository that PEFT saved, or that looks like one; its configuration is checked at once.

    Raises:
        NotFoundError, CheckpointError: there is none, or it is of a kind that is not served.
    """

    def __init__(self, source: AdapterSource) -> None:
        self.source = source if isinstance(source, Source) else Source(source)
        self.name = str(self.source.folder or self.source.name_or_folder)
        self.config = self.source.read_json(ADAPTER)
        self._check()
        path = self.source.find(WEIGHTS)
        if path is None:
            pickled = f"holds its weights as {PICKLE}, a pickle, which can run code when it is loaded; save it again"
            raise CheckpointError(
                f"{self.name} {pickled if self.source.exists(PICKLE) else f'holds no {WEIGHTS}; save it'} with PEFT: "
                "model.save_pretrained(folder)"
            )
        self.files = [path]
        self.tensors = weight_names(self.files)

    def _check(self) -> None:
        kind = self.config.get("peft_type")
        if kind != "LORA":
            merge = "merge it into its model with PEFT: model.merge_and_unload().save_pretrained(folder)"
            raise CheckpointError(f"{self.name} has peft_type {shown(kind)}; adapters are LORA here, so {merge}")
        for name, value in self.config.items():
            if name not in _READ | _IDLE and value not in _OFF:
                raise CheckpointError(
                    f"{self.name} has {name} {shown(value)}, which is not served; merge it into its model with PEFT: "
                    "model.merge_and_unload().save_pretrained(folder)"
                )
        initialized = self.config.get("init_lora_weights", True)
        if initialized not in _INITIALIZED:
            raise CheckpointError(
                f"{self.name} has init_lora_weights {shown(initialized)}, which changes the base's weights, too; "
                "convert it with PEFT: save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
            )
        for name, field in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            patterns = self.config.get(field) or {}
            if not isinstance(patterns, dict):
                raise CheckpointError(f"{self.name} has {field} {shown(patterns)}; it must be numbers by layers' names")
            for value in (self.config.get(name, 8), *patterns.values()):
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                    raise CheckpointError(f"{self.name} has {name} {shown(value)}; it must be a number above 0")

    @property
    def labels(self) -> int | None:
        """How many scores its classifier gives, if it holds one."""
        shapes = [shape for name, (_, shape, _) in self.tensors.items() if _plain_name(name) == "classifier.weight"]
        return shapes[0][0] if shapes and len(shapes[0]) == 2 else None

    def summary(self) -> dict[str, Any]:
        """What it is, in plain values."""
        of_layers = [found for name in self.tensors if (found := _LOW_RANK.fullmatch(_plain_name(name)))]
        layers = sorted({found[1].rpartition(".")[2] for found in of_layers})
        numbers = sum(math.prod(shape) for _, shape, _ in self.tensors.values())
        kinds = {"dora": self.config.get("use_dora"), "rank-stabilized": self.config.get("use_rslora")}
        named = ", ".join(["LoRA", *(name for name, on in kinds.items() if on)])
        return {"kind": named, "rank": self.config.get("r", 8), "layers": ", ".join(layers), "numbers": numbers}

    def labelling(self, scores: int | None) -> dict[str, Any]:
        """What a configuration is to say of labels, where its classifier gives so many scores.

        A run of fine-tuning here leaves a `config.json` with their names beside the adapter.
        """
        if scores is None or not self.labels:
            return {}
        saved = self.source.read_json("config.json") if self.source.find("config.json") is not None else {}
        names = saved.get("id2label")
        if isinstance(names, dict) and len(names) == self.labels:
            return {key: saved[key] for key in ("id2label", "label2id", "problem_type") if saved.get(key) is not None}
        return {} if scores == self.labels else {"num_labels": self.labels}

    def _of_layer(self, field: str, otherwise: str, layer: str) -> Any:
        """A layer's rank or alpha: of the first pattern that the end of its name fits, or else that of all."""
        patterns = self.config.get(field) or {}
        for pattern, value in patterns.items():
            if _REPEATED.search(pattern):
                raise CheckpointError(
                    f"{self.name} has the {field} {shown(pattern)}; a group in it may not be repeated"
                )
            try:
                if re.fullmatch(rf"(.*\.)?({pattern})", layer):
                    return value
            except re.error as error:
                raise CheckpointError(f"{self.name} has the {field} {shown(pattern)}: {error}") from error
        return self.config.get(otherwise, 8)

    def fit(self, model: Any) -> Adapter:
        """The adapter on a model, which may be on the meta device yet.

        Raises:
            CheckpointError: a tensor has no place in the model, or has another shape.
        """
        prefix = f"{model.base_model_prefix}."
        modules = dict(model.named_modules(remove_duplicate=False))
        parameters = dict(model.named_parameters(remove_duplicate=False))
        places = {*modules, *parameters}
        has_prefix = any(name.startswith(prefix) for name in places)

        def placed(name: str) -> str:
            """A bare model's names have no prefix; either fits either."""
            if name in places:
                return name
            other = prefix + name if has_prefix else name.removeprefix(prefix)
            return other if other in places else name

        keeps = self.config.get("modules_to_save") not in _OFF or self.config.get("bias") not in _OFF
        parts: dict[str, dict[str, Tensor]] = {}
        values: dict[str, Tensor] = {}
        for key, tensor in read_weights(self.files, lambda name: True):
            name = _plain_name(key)
            if not tensor.is_floating_point():
                raise CheckpointError(f"{self.name} holds {tensor.dtype} as {printable(name)}; it must be floats")
            if found := _LOW_RANK.fullmatch(name):
                layer, part, leaf = found.groups()
                parts.setdefault(placed(layer), {})[part if leaf != "bias" else "bias"] = tensor
            elif placed(name) in parameters and keeps:
                values[placed(name)] = tensor
            elif not (name.startswith(_HEADS) and keeps):  # of another head, as in checkpoints
                raise CheckpointError(
                    f"{self.name} holds {printable(name)}, which has no place in {type(model).__name__}"
                )
        for name, tensor in values.items():
            if tensor.shape != parameters[name].shape:
                sizes = f"{tuple(tensor.shape)}, the model wants {tuple(parameters[name].shape)}"
                raise CheckpointError(f"{self.name} does not fit {type(model).__name__}; {name} is {sizes}")
        low = {layer: self._low_rank(layer, named, modules) for layer, named in parts.items()}
        if not low and not values:
            raise CheckpointError(f"{self.name} holds no tensor of {type(model).__name__}")
        return Adapter(low, values)

    def _low_rank(self, layer: str, parts: dict[str, Tensor], modules: Mapping[str, Any]) -> LowRank:
        module = modules.get(layer)
        size = getattr(module, "out_features", None), getattr(module, "in_features", None)
        if None in size:
            what = "there is no such layer" if module is None else f"it is a {type(module).__name__}"
            raise CheckpointError(f"{self.name} adapts {printable(layer)}, and {what}; adapters are of linear layers")
        a, b = parts.get("A"), parts.get("B")
        rank = self._of_layer("rank_pattern", "r", layer)
        if a is None or b is None or a.shape != (rank, size[1]) or b.shape != (size[0], rank):
            found = " and ".join("missing" if t is None else str(tuple(t.shape)) for t in (a, b))
            wanted = f"{(rank, size[1])} and {(size[0], rank)}"
            raise CheckpointError(f"{self.name} has matrices {found} for {printable(layer)}; they must be {wanted}")
        more = {"bias": parts.get("bias"), "magnitude_vector": parts.get("magnitude_vector")}
        for name, vector in more.items():
            wants = bool(self.config.get("lora_bias" if name == "bias" else "use_dora"))
            if wants != (vector is not None) or (vector is not None and vector.numel() != size[0]):
                held = "none" if vector is None else tuple(vector.shape)
                raise CheckpointError(
                    f"{self.name} has {held} as lora {name} of {printable(layer)}; it must be "
                    f"{(size[0],) if wants else 'none'}"
                )
        wide = [
            None if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in (a, b, *more.values())
        ]
        alpha = self._of_layer("alpha_pattern", "lora_alpha", layer)
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        vectors = [None if vector is None else vector.flatten() for vector in wide[2:]]
        assert wide[0] is not None
        assert wide[1] is not None
        return LowRank(wide[0], wide[1], scale, *vectors)


def _plain_name(key: str) -> str:
    """A tensor's name without the words of PEFT's wrappers."""
    return _WRAPPERS.sub("", key.removeprefix("base_model.model."))


def as_named(adapter: AdapterSource | Mapping[str, AdapterSource] | None) -> dict[str, AdapterFolder]:
    """What callers give as `adapter`: one, which is called "default", or several by their names."""
    if adapter is None:
        return {}
    named = dict(adapter) if isinstance(adapter, Mapping) else {"default": adapter}
    wrong = [name for name, of in named.items() if not isinstance(name, str) or not isinstance(of, str | Path | Source)]
    if wrong or not named:
        raise InputError(f"adapter is {shown(adapter)}; give a folder or repository, or a dict of them by name")
    return {name: AdapterFolder(of) for name, of in named.items()}


def with_base(name: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A checkpoint's name and the arguments that load it: of an adapter's folder those of its base, with the adapter.

    Folders that say by themselves what their model is, in a `config.json` or as a layout of sentence-transformers, stay
    as they are: what loads the model inside of them finds the base.
    """
    if not isinstance(name, str | Path):
        return name, kwargs
    rest = dict(kwargs)
    source = Source.pop_from(name, rest)
    if any(source.find(file) is not None for file in ("config.json", "modules.json")):
        return name, kwargs
    if (base := source.base_of_adapter()) is None:
        return name, kwargs
    if rest.get("adapter") is not None:
        raise InputError(f"{name} is an adapter itself, and adapter is given, too; give its base and both")
    places = {key: value for key, value in base.arguments.items() if value not in (None, "", False)}
    return places.pop("pretrained_model_name_or_path"), {**rest, **places, "adapter": source}


# Models


@dataclasses.dataclass
class _State:
    """What a model has of adapters.

    Attributes:
        loaded: by name.
        active: names of those that act, in the order in which they were asked for.
        enabled: whether they act at all.
        merged: whether additions are in the weights.
        base: parameters of the model itself, where others stand for them now.
    """

    loaded: dict[str, Adapter] = dataclasses.field(default_factory=dict)
    active: tuple[str, ...] = ()
    enabled: bool = True
    merged: bool = False
    base: dict[str, nn.Parameter] = dataclasses.field(default_factory=dict)

    def realize(self, model: Any) -> None:
        """Make the model what this says."""
        for name, parameter in self.base.items():
            _put(model, name, parameter)
        self.base = {}
        for part in model.modules():
            if isinstance(part, Adapted):
                object.__setattr__(part, "__class__", part.plain)
                del part.__dict__["low"]
        acting = [self.loaded[name] for name in self.active] if self.enabled else []
        for adapter in acting:
            for name, value in adapter.values.items():
                self._exchange(model, name, value)
        for layer in dict.fromkeys(layer for adapter in acting for layer in adapter.low):
            module: Any = model.get_submodule(layer)
            low = tuple(adapter.low[layer].on(module) for adapter in acting if layer in adapter.low)
            if self.merged:
                own: Tensor | None = module._parameters.get("bias")
                weight, bias = module.weight.detach(), own
                for one in low:
                    weight, bias = one.into(weight, bias)
                self._exchange(model, f"{layer}.weight", weight)
                if bias is not own:
                    self._exchange(model, f"{layer}.bias", bias)
            else:
                object.__setattr__(module, "__class__", _adapted(type(module)))
                module.low = low

    def _exchange(self, model: Any, name: str, value: Any) -> None:
        """Put a value in the place of a parameter, which is kept."""
        before = model.get_parameter(name)
        self.base.setdefault(name, before)
        _put(model, name, nn.Parameter(value.detach().to(before, copy=True), before.requires_grad))


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)


class WithAdapters:
    """What models do with adapters, by transformers' and PEFT's names. Nothing here trains one: PEFT does."""

    _adapters: _State | None = None

    def load_adapter(self, peft_model_id: AdapterSource, adapter_name: str = "default", **kwargs: Any) -> None:
        """Load a LoRA adapter that PEFT saved, and make it the active one.

        On a model that is optimized for inference it acts like on a plain one.

        Args:
            peft_model_id: a folder or repository.
            adapter_name: what to call it.
            kwargs: `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only`, `force_download`: where to look;
                see `modernbert.io.hub.Source`.

        Raises:
            NotFoundError: there is no such folder or repository.
            CheckpointError: it is no LoRA adapter of this model, or one with options that are not served.
            InputError: the name is taken.

        Source: LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732; DoRA, arXiv:2402.09353; PEFT's folders.
        """
        source = peft_model_id if isinstance(peft_model_id, Source) else Source.pop_from(peft_model_id, kwargs)
        if kwargs:
            raise TypeError(f"load_adapter has no argument {listed(kwargs)}")
        self.attach_adapters({adapter_name: AdapterFolder(source).fit(self)})

    def attach_adapters(self, adapters: Mapping[str, Adapter]) -> None:
        """Add adapters that fit, and make the first one the active one."""
        state = self._adapters or _State()
        if wrong := [name for name in adapters if not isinstance(name, str) or not name]:
            raise InputError(f"adapter_name is {shown(wrong[0])}; it must be a name")
        if taken := [name for name in adapters if name in state.loaded]:
            raise InputError(f"adapter_name is {taken[0]!r}, which is taken; choose another, or delete_adapter first")
        loaded = {**state.loaded, **adapters}
        self._change(loaded=loaded, active=tuple(list(adapters)[:1]), enabled=True)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Let this adapter act instead of those that act now; or several, whose changes add up.

        The outputs are the same bits as of a model with that adapter alone. An optimized model stays optimized. While
        adapters are switched, in whichever way, no other thread may compute with the model.
        """
        names = _names(adapter_name)
        self._known(names)
        if not names or len(set(names)) < len(names):
            raise InputError(f"adapter_name is {list(names)}; give one name, or several that differ")
        self._change(active=names, enabled=True)

    def active_adapters(self) -> list[str]:
        """The names of the adapters that act."""
        state = self._adapters
        return list(state.active) if state is not None and state.enabled else []

    @property
    def adapter_names(self) -> list[str]:
        """The names of all adapters that are loaded."""
        return [] if self._adapters is None else list(self._adapters.loaded)

    def disable_adapters(self) -> None:
        """Let the base alone compute: the bits of a model without adapters."""
        self._known(())
        self._change(enabled=False)

    def enable_adapters(self) -> None:
        """Let the adapters act again that did before `disable_adapters`."""
        self._known(())
        self._change(enabled=True)

    def delete_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Forget adapters; if none of the active ones is left, the base computes until `set_adapter`."""
        names = _names(adapter_names)
        state = self._known(names)
        loaded = {name: adapter for name, adapter in state.loaded.items() if name not in names}
        active = tuple(name for name in state.active if name not in names)
        self._change(loaded=loaded, active=active)

    def merge_adapter(self) -> None:
        """Add the active adapters to the weights: nothing is computed beside them, so that kernels run whole layers.

        The base's weights are kept aside, so that switching, disabling and `unmerge_adapter` go on giving exact bits;
        `merge_and_unload` does without. Merged weights are rounded to the model's dtype, which costs little in float32
        and up to a whole small change in bfloat16.

        Raises:
            InputError: a weight is quantized, or is shared with the embedding.
        """
        self._known(())
        self._change(merged=True)

    def unmerge_adapter(self) -> None:
        """Take the adapters out of the weights again, exactly."""
        self._known(())
        self._change(merged=False)

    def merge_and_unload(self) -> Self:
        """Add the active adapters to the weights for good, and forget all adapters; returns the model."""
        self.merge_adapter()
        self._adapters = None
        return self

    def unload(self) -> Self:
        """Forget all adapters; returns the model, which is the base again."""
        self._known(())
        self._change(loaded={}, active=())
        self._adapters = None
        return self

    def _known(self, names: Sequence[str]) -> _State:
        state = self._adapters
        if state is None:
            raise InputError("no adapter is loaded; load_adapter(folder) loads one")
        if unknown := [name for name in names if name not in state.loaded]:
            there = listed(state.loaded) or "none"
            raise InputError(f"adapter_name is {shown(unknown[0])}; there are {there}")
        return state

    def _change(self, **changes: Any) -> None:
        """Change what acts, all or nothing; what was optimized is optimized again."""
        with LOCK:
            self._change_alone(**changes)

    def _change_alone(self, **changes: Any) -> None:
        model: Any = self
        state = dataclasses.replace(self._adapters or _State(), **changes)
        acting = [state.loaded[name] for name in state.active] if state.enabled else []
        values = [name for adapter in acting for name in adapter.values]
        if twice := sorted({name for name in values if values.count(name) > 1}):
            raise InputError(f"adapters {listed(state.active)} all replace {listed(twice)}; let one of them act")
        if state.merged:
            _check_mergeable(model, acting)
        with _thawed(model):
            state.realize(model)
            self._adapters = state

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        model: Any = super()
        model._apply(fn, recurse)
        with torch.no_grad():
            for parameter in self._adapters.base.values() if self._adapters is not None else ():
                parameter.data = fn(parameter.data)
        return self

    def refuse_adapters(self, what: str, loaded: bool = False) -> None:
        """Raise `InputError` where adapters act beside the weights, or are `loaded`, and something knows none."""
        names = self.adapter_names if loaded else self.active_adapters()
        if names and (loaded or not (self._adapters and self._adapters.merged)):
            raise InputError(
                f"{what} is for the weights alone, and there are adapters ({listed(names)}); merge_and_unload() adds "
                "them to the weights, unload() leaves them out"
            )


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        raise InputError(f"adapter_name is {shown(given)}; give a name or a list of names")
    return tuple(given)


def merge_adapters(model: nn.Module) -> None:
    """Add to the weights for good what acts beside them in a model or in its parts, such as what a folder held."""
    for part in list(model.modules()):
        if isinstance(part, WithAdapters) and part.adapter_names:
            part.merge_and_unload()


def _check_mergeable(model: Any, acting: Sequence[Adapter]) -> None:
    tied = {*model.tied_weights, *model.tied_weights.values()} if model.config.tie_word_embeddings else set[str]()
    for adapter in acting:
        if shared := sorted(tied & adapter.values.keys()):
            raise InputError(
                f"an adapter's {shared[0]} cannot be merged; the model's embedding and output share one weight "
                "(tie_word_embeddings). Unmerged it acts as well"
            )
    for layer in dict.fromkeys(layer for adapter in acting for layer in adapter.low):
        module = model.get_submodule(layer)
        weight, low = module._parameters.get("weight"), [a.low[layer] for a in acting if layer in a.low]
        why = None
        if weight is None:
            why = "its weight is quantized: merge first, and quantize what comes out"
        elif f"{layer}.weight" in tied:
            why = "its weight is the token embedding's, too (tie_word_embeddings)"
        elif any(one.bias_O is not None for one in low) and module._parameters.get("bias") is None:
            why = "it has no bias, and the adapter has one for it"
        elif len(low) > 1 and any(one.magnitude_O is not None for one in low):
            why = "of several adapters (use_dora), each wants the base's weight: merge one"
        if why is not None:
            raise InputError(f"an adapter of {layer} cannot be merged; {why}. Unmerged it acts as well")


@contextlib.contextmanager
def _thawed(model: Any) -> Iterator[None]:
    """The plain model meanwhile; one that was optimized is optimized again."""
    was_frozen = is_frozen(model)
    thaw(model)
    with torch.no_grad():
        yield
    if was_frozen:
        model.optimize_for_inference()
