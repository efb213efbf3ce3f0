"""The decoder's cache: keys and values of every text so far, one after another.

Texts lie in regions of slots, each with its own length, so no prompt is padded to another's. A layer that attends to
everything before a token keeps all of it, in regions with some room to grow; a layer that attends to a window keeps a
ring of the window alone. All layers of a kind share one table of regions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from modernbert.config import Config
from modernbert.decoding.continuation import Continuation, Pass, Region, Storage
from modernbert.errors import InputError, shown
from modernbert.nn.attention.contract import AttentionBackend
from modernbert.nn.execution import AttentionWeights
from modernbert.nn.linear import products_dtype
from modernbert.nn.packing import Packing

_TABLES = ("starts", "capacities", "first")  # the names that the parts of regions are saved under


def _signature(config: Config) -> dict[str, Any]:
    """What caches and models must agree in."""
    return {
        "layer_types": list(config.layer_types or ()),
        "heads": [
            config.num_attention_heads - len(config.pruned_heads.get(i, [])) for i in range(config.num_hidden_layers)
        ],
        "head_dim": config.head_dim,
        "local_attention": config.local_attention,
    }


Mark = tuple[list[int], list[int], int]  # lengths and ends of all texts, and columns


class LayerCache(NamedTuple):
    """Keys and values of one layer, each (texts, heads, columns, head size)."""

    keys: Tensor
    values: Tensor


class DecoderCache:
    """Keys and values of a batch of texts: what `past_key_values` is.

    A model makes one where none is given, and changes the one that it is given. Texts may have any lengths; a text
    goes on where it ended, wherever padding was. By index and one after another it gives the keys and values of each
    layer, see `padded`.

    Args:
        config: of the model; None takes that of the model that is called with it first.
        slack: how many tokens `crop` can take back from texts longer than the local window. Each costs as much as
            one token of a local layer.

    Keys are kept as they were rotated. The "dynamic" rotary embedding rotates by a text's length, so that past the
    trained context a cached text is not quite what it would be without a cache.

    Raises:
        InputError: `slack` is no whole number of at least 0.
    """

    def __init__(self, config: Config | None = None, slack: int = 0) -> None:
        if not isinstance(slack, int) or isinstance(slack, bool) or slack < 0:
            raise InputError(f"slack is {slack!r}; it must be a whole number of at least 0")
        self.config, self.slack = config, slack
        self.kinds: dict[str, Storage] = {}
        self.lengths: list[int] = []
        self.ends: list[int] = []
        self.columns = 0
        self._unfinished: Mark | None = None
        self.one_by_one = False  # compute several new tokens of a text as if each had come by itself
        self._moving = False  # where it stays true, memory ran out while texts were moved
        if config is not None:
            self._configure(config)

    def _configure(self, config: Config) -> None:
        self.config = config
        self.kinds = {kind: Storage(config.reach(kind), self.slack) for kind in dict.fromkeys(config.layer_types or ())}

    @property
    def configured(self) -> Config:
        """The model's configuration; raises `InputError` where no model was called with the cache yet."""
        if self.config is None:
            raise InputError("this cache was made without a configuration, and no model was called with it yet")
        return self.config

    def __len__(self) -> int:
        """Number of layers that hold something."""
        return sum(len(storage.layers) for storage in self.kinds.values())

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, layer: int) -> LayerCache:
        """Keys and values of a layer; see `padded`."""
        if not -len(self) <= layer < len(self):
            raise IndexError(f"layer {layer} is given; the cache holds layers 0 to {len(self) - 1}")
        return self.padded(layer % len(self))

    def __iter__(self) -> Iterator[LayerCache]:
        return (self.padded(layer) for layer in range(len(self)))

    def __repr__(self) -> str:
        return f"DecoderCache({self.texts} texts of {self.lengths} tokens, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def texts(self) -> int:
        """Number of texts."""
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes that all layers take, free slots included."""
        return sum(storage.nbytes for storage in self.kinds.values())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of all padded input so far, padding included; the longest text where the input came packed."""
        return self.columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: a cache grows as it must."""
        return -1

    @property
    def seen_tokens(self) -> int:
        """`get_seq_length`, by an older name."""
        return self.columns

    @property
    def layers(self) -> list[LayerCache]:
        """`padded` of all layers."""
        return list(self)

    def padded(self, layer: int, columns_BW: Tensor | None = None) -> LayerCache:
        """Keys and values (texts, heads, columns, head size) of a layer, zeros at padding and at what a local layer no
        longer holds.

        Args:
            layer: its number.
            columns_BW: which of the last columns are tokens; None pads on the left, to `get_seq_length` columns.
        """
        storage = self.kinds[(self.configured.layer_types or ())[layer]]
        if columns_BW is None:
            width = max(self.columns, *self.lengths)
            columns_BW = torch.tensor([[i >= width - n for i in range(width)] for n in self.lengths])
        out = []
        for stored in storage.layers[layer]:
            grid = stored.new_zeros((self.texts, columns_BW.shape[1], *stored.shape[1:]))
            for row, real, at, length in zip(grid, columns_BW, storage.regions, self.lengths, strict=True):
                tokens = [(length - int(real.sum()) + i, c) for i, c in enumerate(real.nonzero()[:, 0].tolist())]
                held = [(token, c) for token, c in tokens if token >= at.kept(length)]
                if held:
                    slots = storage.slots([(at, held[0][0], length)])
                    row[[c for _, c in held]] = stored[slots]
            out.append(grid.transpose(1, 2))
        return LayerCache(*out)

    def to_legacy_cache(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """`layers` as plain tuples."""
        return tuple((keys, values) for keys, values in self)

    # What a forward pass does

    def check_model(self, config: Config) -> None:
        """Refuse a model that this is no cache of; raises `InputError`."""
        if self.config is None:
            self._configure(config)
        ours, theirs = _signature(self.configured), _signature(config)
        if ours != theirs:
            differ = ", ".join(name for name in ours if ours[name] != theirs[name])
            raise InputError(f"past_key_values is of another model; {differ} differ")

    @property
    def is_whole(self) -> bool:
        """Whether no forward pass that failed has left it half-written."""
        return self._unfinished is None and not self._moving

    def _check_whole(self) -> None:
        if not self.is_whole:
            raise InputError("past_key_values was left half-written by a forward pass that failed; make a new one")

    def begin(
        self, packing: Packing, backend: AttentionBackend, dtype: torch.dtype, gather: bool = False,
        weights: AttentionWeights | None = None,
    ) -> dict[str, Continuation]:  # fmt: skip
        """Make room for new tokens, before the layers write them; how each kind attends. See `nn.execution.Cache`."""
        self._check_whole()
        held = products_dtype(dtype, packing.positions_T.device)
        for k, _ in (pair for storage in self.kinds.values() for pair in storage.layers.values()):
            if k.dtype != held:
                raise InputError(f"past_key_values holds {k.dtype} and the model computes in {held}; make a new one")
        if not self.lengths:
            self.lengths, self.ends = [[0] * len(packing.lengths) for _ in range(2)]
        if len(packing.lengths) != len(self.lengths):
            raise InputError(f"the input has {len(packing.lengths)} texts; past_key_values holds {len(self.lengths)}")
        self._moving = True
        for storage in self.kinds.values():
            storage.to(packing.positions_T.device)
            storage.make_room(self.lengths, packing.lengths)
        self._moving = False
        last = list(packing.lengths)
        if packing.gaps:
            last = [int(p[-1]) + 1 if len(p) else 0 for p in packing.positions_T.split(packing.lengths)]
        ends = [end + n for end, n in zip(self.ends, last, strict=True)]
        lengths = [length + n for length, n in zip(self.lengths, packing.lengths, strict=True)]
        columns = self.columns + packing.grid[1] if packing.grid is not None else max(lengths, default=0)
        self._unfinished = (lengths, ends, columns)
        past, ends_before = list(self.lengths), list(self.ends)
        new = Pass(packing, past, ends_before, backend, dtype, gather, weights, self.one_by_one)
        return {kind: Continuation(new, storage) for kind, storage in self.kinds.items()}

    def reserve(self, tokens: int) -> None:
        """Have room for this many more tokens of each text at once; what is held already stays."""
        for storage in self.kinds.values():
            storage.reserve(tokens)

    def finish(self) -> None:
        """Count the new tokens, after the last layer."""
        assert self._unfinished is not None
        self.lengths, self.ends, self.columns = self._unfinished
        self._unfinished = None

    def mark(self) -> Mark:
        """What `back` goes back to."""
        self._check_whole()
        return list(self.lengths), list(self.ends), self.columns

    def back(self, mark: Mark) -> bool:
        """Be as before a pass that failed, in place; whether that can be, or else the cache is lost.

        It can where each text that had tokens got one at the most, and nothing was to be cropped: that one overwrote in
        a local layer what no later token sees, and is overwritten itself when it comes again.
        """
        now = self.lengths if self._unfinished is None else self._unfinished[0]
        new = [length - old for old, length in zip(mark[0], now, strict=True) if old]
        if self._moving or max(new, default=0) > 1:
            return False
        self.lengths, self.ends, self.columns = list(mark[0]), list(mark[1]), mark[2]
        self._unfinished = None
        return True

    # What callers do

    def extend(self, texts: int) -> Self:
        """Add so many texts that have no tokens yet, after the present ones, in place."""
        self._check_whole()
        for storage in self.kinds.values():
            storage.extend(texts)
        self.lengths, self.ends = [*self.lengths, *[0] * texts], [*self.ends, *[0] * texts]
        return self

    def select(self, texts: Sequence[int] | Tensor) -> Self:
        """Keep these texts in this order, in place; a text may be named several times.

        Raises:
            InputError: there is no such text.
        """
        self._check_whole()
        texts = [int(t) for t in (texts.tolist() if isinstance(texts, Tensor) else texts)]
        if any(not 0 <= t < self.texts for t in texts):
            raise InputError(f"texts are {texts}; the cache holds texts 0 to {self.texts - 1}")
        for storage in self.kinds.values():
            storage.select(texts, self.lengths)
        self.lengths = [self.lengths[t] for t in texts]
        self.ends = [self.ends[t] for t in texts]
        self.columns = self.columns if texts else 0
        return self

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """`select`, by the name that the reference has for it."""
        self.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each text this many times, one after another."""
        self.select([t for t in range(self.texts) for _ in range(repeats)])

    def crop(self, max_length: int) -> Self:
        """Forget all but the first `max_length` tokens of each text, in place; a negative number forgets that many.

        Raises:
            InputError: a local layer no longer holds what tokens before the cut would see. `slack` keeps more.
        """
        wanted = [min(n, max_length) if max_length >= 0 else max(n + max_length, 0) for n in self.lengths]
        return self.cut(wanted, f"max_length is {max_length}")

    def cut(self, wanted: Sequence[int], given: str = "") -> Self:
        """Forget all but the first `wanted` tokens of each text, in place; as `crop`, which cuts all alike."""
        self._check_whole()
        texts = list(enumerate(zip(wanted, self.lengths, strict=True)))
        for storage in self.kinds.values():
            left = storage.reach.left
            for i, (to, length) in texts:
                kept = storage.regions[i].kept(length)
                if left is not None and to < length and kept > max(0, to - left):
                    raise InputError(
                        f"{given or f'{to} tokens are to stay'}; a text of {length} tokens can be cropped to "
                        f"{kept + left} at the least, because local layers keep a window alone. "
                        "DecoderCache(config, slack=...) keeps more"
                    )
        for storage in self.kinds.values():
            storage.forget(self.lengths, wanted)
            for i, (to, length) in texts:
                if to < length:
                    last = storage.slots([(storage.regions[i], max(0, to - 1), to)])
                    self.ends[i] = int(storage.positions_R[last]) + 1 if to else 0
        self.columns = max(0, self.columns - max((length - to for _, (to, length) in texts), default=0), *wanted)
        self.lengths = list(wanted)
        return self

    def to(self, device: torch.device | str) -> Self:
        """Move to a device, in place."""
        for storage in self.kinds.values():
            storage.to(torch.device(device))
        return self

    def copy(self) -> DecoderCache:
        """A cache of its own with the same content, to go on in two ways from one text."""
        return type(self).from_bytes(self.to_bytes(), self.configured)

    def to_bytes(self) -> bytes:
        """The whole cache as safetensors, in memory."""
        self._check_whole()
        tables = {"lengths": self.lengths, "ends": self.ends, "shape": [self.columns, self.slack]}
        tensors = {"model": torch.tensor(list(json.dumps(_signature(self.configured)).encode()), dtype=torch.uint8)}
        for kind, storage in self.kinds.items():
            tables |= {f"{kind}/{name}": [at[i] for at in storage.regions] for i, name in enumerate(_TABLES)}
            tensors[f"{kind}/positions"] = storage.positions_R
            for layer, (k, v) in storage.layers.items():
                tensors[f"{kind}/{layer}/k"], tensors[f"{kind}/{layer}/v"] = k, v
        tensors |= {name: torch.tensor(numbers, dtype=torch.int64) for name, numbers in tables.items()}
        return safetensors.torch.save(tensors)

    @classmethod
    def from_bytes(cls, content: bytes, config: Config) -> DecoderCache:
        """Read what `to_bytes` gave.

        Raises:
            InputError: the content is no cache, or of another model.
        """
        with torch.inference_mode(False):  # what is written in place must be writable anywhere
            try:
                tensors = safetensors.torch.load(content)
            except SafetensorError as error:
                raise InputError(f"these {len(content)} bytes are no saved cache: {error}") from error
        try:
            return cls._of_tensors(tensors, config)
        except (KeyError, ValueError, IndexError, TypeError, RuntimeError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"these {len(content)} bytes are no whole saved cache: {error!r}") from error

    @classmethod
    def _of_tensors(cls, tensors: Mapping[str, Tensor], config: Config) -> DecoderCache:
        if "model" not in tensors:
            raise InputError("what is given is no saved cache: it does not say of what model")
        saved = json.loads(bytes(tensors["model"].tolist()))
        if saved != json.loads(json.dumps(_signature(config))):
            raise InputError(f"the saved cache is of another model: {shown(str(saved))}, not {_signature(config)}")

        def table(name: str) -> list[int]:
            if tensors[name].dtype != torch.int64:
                raise InputError(f"the saved cache has {name} as {tensors[name].dtype}; it is damaged")
            numbers: list[int] = tensors[name].tolist()
            return numbers

        columns, slack = table("shape")
        cache = cls(config, slack)
        cache.lengths, cache.ends, cache.columns = table("lengths"), table("ends"), columns
        if len(cache.ends) != len(cache.lengths):
            raise InputError(f"the saved cache has {len(cache.lengths)} lengths and {len(cache.ends)} ends")
        for kind, storage in cache.kinds.items():
            columns_of = [table(f"{kind}/{name}") for name in _TABLES]
            storage.regions = [Region(*numbers) for numbers in zip(*columns_of, strict=True)]
            storage.positions_R = tensors[f"{kind}/positions"]
            layers = [i for i, of in enumerate(config.layer_types or ()) if of == kind]
            for i in layers if cache.lengths else []:
                storage.layers[i] = (tensors[f"{kind}/{i}/k"], tensors[f"{kind}/{i}/v"])
            storage.check(cache.lengths, {i: (saved["heads"][i], config.head_dim) for i in layers})
        return cache


DynamicCache = DecoderCache  # the name that scripts know
