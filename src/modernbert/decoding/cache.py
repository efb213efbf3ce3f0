"""The decoder's cache: keys and values of every text so far, packed.

Texts lie in regions of rows, each with its own length, so no prompt is padded to another's. A layer that attends to
everything before a token keeps all of it, in regions with some room to grow; a layer that attends to a window keeps a
ring of the window alone. All layers of a kind share one table of regions.

Shapes: R rows of storage, T new tokens of all texts together, H heads, D head size, B texts.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from modernbert.config import Config, Reach
from modernbert.decoding.continuation import Continuation, Pass
from modernbert.errors import InputError, shown
from modernbert.nn.attention.contract import AttentionBackend
from modernbert.nn.execution import Weights
from modernbert.nn.linear import products_dtype
from modernbert.nn.packing import Packing, send

_ROOM = 128  # free rows that a growing region gets: a copy of the text's rows every so many tokens
_MOST_RESERVED = 4096  # free rows that may be asked for ahead
_NOWHERE = -(2**40)  # position of a row that holds no token: out of everyone's reach


class Storage:
    """Rows of keys and values of all layers of one kind.

    Attributes:
        room_ahead: free rows that a growing region gets.
        starts: first row of each text's region.
        capacities: rows of each region.
        ring: tokens that a region keeps, token i in row i modulo this; None keeps all.
        first: for each text its first token that is held, where a crop left less than `ring` says.
        positions_R: (R,) the position of the token in each row.
        layers: number of a layer -> its keys and values, each (R, H, D); made when the layer first writes.
    """

    def __init__(self, ring: int | None) -> None:
        self.ring = ring
        self.room_ahead = _ROOM
        self.starts: list[int] = []
        self.capacities: list[int] = []
        self.first: list[int] = []
        self.positions_R = torch.empty(0, dtype=torch.int64)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, free ones included."""
        return self.positions_R.nbytes + sum(k.nbytes + v.nbytes for k, v in self.layers.values())

    def check(self, lengths: Sequence[int], config: Config) -> None:
        """Refuse tables that do not fit each other or the model, as a damaged file may hold; raises `InputError`."""
        rows, texts = len(self.positions_R), len(lengths)
        regions = list(zip(self.starts, self.capacities, self.first, lengths, strict=True))
        inside = len(regions) == texts and all(
            start >= 0 and start + capacity <= rows and 0 <= first <= length
            and (capacity == self.ring if self.ring else length <= capacity)
            for start, capacity, first, length in regions
        )  # fmt: skip
        whole = self.positions_R.dtype == torch.int64 and self.positions_R.dim() == 1
        stored = all(
            x.shape == (rows, config.num_attention_heads - len(config.pruned_heads.get(layer, [])), config.head_dim)
            and x.is_floating_point()
            for layer, pair in self.layers.items()
            for x in pair
        )
        if not (inside and whole and stored):
            raise InputError("the saved cache holds rows that do not fit its texts or the model; it is damaged")

    def kept(self, text: int, length: int) -> int:
        """The first token that is held of a text once it has this length."""
        return 0 if self.ring is None else max(self.first[text], length - self.ring)

    def rows(self, texts: Sequence[tuple[int, int, int]]) -> Tensor:
        """Rows of tokens: for each (text, first, last) those of tokens first to last - 1, one text after another."""
        parts = []
        for text, first, last in texts:
            token = torch.arange(first, last)
            parts.append(self.starts[text] + (token if self.ring is None else token % self.ring))
        return send(torch.cat([torch.empty(0, dtype=torch.int64), *parts]), self.positions_R.device)

    def make_room(self, lengths: Sequence[int], new: Sequence[int]) -> None:
        """Let each text hold this many tokens more."""
        if not self.starts:
            self.move([], [], [self.room(n) for n in new])
        elif any(length + n > c for length, n, c in zip(lengths, new, self.capacities, strict=True) if not self.ring):
            wanted = [self.room(length + n) for length, n in zip(lengths, new, strict=True)]
            self.move(range(len(lengths)), lengths, wanted)

    def room(self, length: int) -> int:
        """Rows for a text of this length."""
        return self.ring or -(-length // 16) * 16 + self.room_ahead

    def move(self, texts: Sequence[int], lengths: Sequence[int], capacities: Sequence[int]) -> None:
        """Lay the regions out anew: these of the present texts, of these lengths and new capacities."""
        held = [(text, self.kept(text, length), length) for text, length in zip(texts, lengths, strict=True)]
        source = self.rows(held)
        self.starts = [0, *itertools.accumulate(capacities)][:-1]
        self.capacities = list(capacities)
        self.first = [first for _, first, _ in held] or [0] * len(capacities)
        target = self.rows([(i, first, last) for i, (_, first, last) in enumerate(held)])
        total = sum(capacities)
        with torch.inference_mode(False), torch.no_grad():
            positions_R = self.positions_R.new_full((total,), _NOWHERE)
            self.positions_R = positions_R.index_copy_(0, target, self.positions_R[source])
            for layer, pair in self.layers.items():
                # Rows without a token are zero: they are multiplied by a weight of zero, which NaN would survive.
                k, v = (old.new_zeros((total, *old.shape[1:])).index_copy_(0, target, old[source]) for old in pair)
                self.layers[layer] = (k, v)

    def select(self, texts: Sequence[int], lengths: Sequence[int]) -> None:
        """Keep these texts, in this order; one may be named several times. `lengths` are those of the present texts."""
        if list(texts) == list(range(len(lengths))):
            return
        if self.ring is not None and len(texts) != len(lengths):
            self.move(texts, [lengths[t] for t in texts], [self.ring] * len(texts))
            return
        used = set(texts)
        free = [t for t in range(len(lengths)) if t not in used]
        seen: set[int] = set()
        starts, capacities, copies = [], [], []
        for text in texts:
            region = text
            if text in seen:
                fitting = [f for f in free if self.capacities[f] >= min(lengths[text], self.capacities[text])]
                if not fitting:
                    chosen = [lengths[t] for t in texts]
                    self.move(texts, chosen, [self.room(n) for n in chosen])
                    return
                region = fitting[0]
                free.remove(region)
                copies.append((text, region))
            seen.add(text)
            starts.append(self.starts[region])
            capacities.append(self.capacities[region])
        spans = [(text, region, self.kept(text, lengths[text]), lengths[text]) for text, region in copies]
        source = self.rows([(text, first, last) for text, _, first, last in spans])
        target = self.rows([(region, first, last) for _, region, first, last in spans])
        if self.ring is not None:
            for _, region in copies:
                self.positions_R[self.starts[region] : self.starts[region] + self.ring] = _NOWHERE
        for stored in (self.positions_R, *itertools.chain.from_iterable(self.layers.values())):
            stored.index_copy_(0, target, stored[source])
        self.starts, self.capacities = starts, capacities
        self.first = [self.first[text] for text in texts]
        if 2 * sum(capacities) < len(self.positions_R):  # most rows belong to no text any more
            chosen = [lengths[t] for t in texts]
            self.move(range(len(texts)), chosen, [self.room(n) for n in chosen])

    def write(self, layer: int, k_THD: Tensor, v_THD: Tensor, rows: Tensor, of_T: Tensor | None) -> None:
        """Put new keys and values, or the rows `of_T` of them, into these rows."""
        if layer not in self.layers:
            with torch.inference_mode(False), torch.no_grad():
                shape = (len(self.positions_R), *k_THD.shape[1:])
                dtype = products_dtype(k_THD.dtype, k_THD.device)
                self.layers[layer] = (k_THD.new_zeros(shape, dtype=dtype), v_THD.new_zeros(shape, dtype=dtype))
        for stored, new in zip(self.layers[layer], (k_THD, v_THD), strict=True):
            new = new.detach().to(stored.dtype)
            stored.index_copy_(0, rows, new if of_T is None else new.index_select(0, of_T))

    def to(self, device: torch.device) -> None:
        """Move to a device."""
        with torch.inference_mode(False):
            self.positions_R = self.positions_R.to(device)
            self.layers = {layer: (k.to(device), v.to(device)) for layer, (k, v) in self.layers.items()}


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


class DecoderCache:
    """Keys and values of a batch of texts: what `past_key_values` is.

    A model makes one where none is given, and changes the one that it is given. Texts may have any lengths; a text
    goes on where it ended, wherever padding was.

    Args:
        config: of the model.
        slack: how many tokens `crop` can take back from texts longer than the local window. Each costs as much as
            one token of a local layer.

    Keys are kept as they were rotated. The "dynamic" rotary embedding rotates by a text's length, so that past the
    trained context a cached text is not quite what it would be without a cache.

    Raises:
        InputError: `slack` is no whole number of at least 0.
    """

    def __init__(self, config: Config, slack: int = 0) -> None:
        if not isinstance(slack, int) or isinstance(slack, bool) or slack < 0:
            raise InputError(f"slack is {slack!r}; it must be a whole number of at least 0")
        self.config = config
        self.slack = slack
        self.lengths: list[int] = []
        self.ends: list[int] = []
        self.columns = 0
        self.kinds: dict[str, tuple[Reach, Storage]] = {}
        for kind in dict.fromkeys(config.layer_types or ()):
            reach = config.reach(kind)
            self.kinds[kind] = (reach, Storage(None if reach.left is None else reach.left + 1 + slack))
        self._unfinished: tuple[list[int], list[int], int] | None = None

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.lengths)

    def __repr__(self) -> str:
        return f"DecoderCache({len(self)} texts of {self.lengths} tokens, {self.nbytes / 2**20:.1f} MiB)"

    @property
    def nbytes(self) -> int:
        """Bytes that all layers take, free rows included."""
        return sum(storage.nbytes for _, storage in self.kinds.values())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of all padded input so far, padding included; the longest text where the input came packed."""
        return self.columns

    # What a forward pass does

    def check_model(self, config: Config) -> None:
        """Refuse a model that this is no cache of; raises `InputError`."""
        ours, theirs = _signature(self.config), _signature(config)
        if ours != theirs:
            differ = ", ".join(name for name in ours if ours[name] != theirs[name])
            raise InputError(f"past_key_values is of another model; {differ} differ")

    def _check_whole(self) -> None:
        if self._unfinished is not None:
            raise InputError("past_key_values was left half-written by a forward pass that failed; make a new one")

    def begin(
        self,
        packing: Packing,
        backend: AttentionBackend,
        dtype: torch.dtype,
        gather: bool = False,
        weights: Weights | None = None,
    ) -> dict[str, Continuation]:
        """Make room for new tokens, before the layers write them; how each kind attends. See `nn.execution.Cache`."""
        self._check_whole()
        held = products_dtype(dtype, packing.positions_T.device)
        for _, storage in self.kinds.values():
            for k, _ in storage.layers.values():
                if k.dtype != held:
                    raise InputError(
                        f"past_key_values holds {k.dtype} and the model computes in {held}; make a new one"
                    )
        if not self.lengths:
            self.lengths, self.ends = [0] * len(packing.lengths), [0] * len(packing.lengths)
        if len(packing.lengths) != len(self.lengths):
            raise InputError(f"the input has {len(packing.lengths)} texts; past_key_values holds {len(self.lengths)}")
        device = packing.positions_T.device
        for _, storage in self.kinds.values():
            if storage.positions_R.device != device:
                storage.to(device)
            storage.make_room(self.lengths, packing.lengths)
        last = list(packing.lengths)
        if packing.gaps:
            last = [int(p[-1]) + 1 if len(p) else 0 for p in packing.positions_T.split(packing.lengths)]
        ends = [end + n for end, n in zip(self.ends, last, strict=True)]
        lengths = [length + n for length, n in zip(self.lengths, packing.lengths, strict=True)]
        columns = self.columns + packing.grid[1] if packing.grid is not None else max(lengths, default=0)
        self._unfinished = (lengths, ends, columns)
        begun = Pass(packing, list(self.lengths), list(self.ends))
        return {
            kind: Continuation(begun, storage, reach, backend, dtype, gather, weights)
            for kind, (reach, storage) in self.kinds.items()
        }

    def reserve(self, tokens: int) -> None:
        """Have room for so many more tokens of each text at once, not bit by bit; what is held already stays."""
        for _, storage in self.kinds.values():
            storage.room_ahead = min(max(tokens, _ROOM), _MOST_RESERVED)

    def finish(self) -> None:
        """Count the new tokens, after the last layer."""
        assert self._unfinished is not None
        self.lengths, self.ends, self.columns = self._unfinished
        self._unfinished = None

    # What callers do

    def select(self, texts: Sequence[int] | Tensor) -> Self:
        """Keep these texts in this order, in place; a text may be named several times.

        Raises:
            InputError: there is no such text.
        """
        self._check_whole()
        texts = [int(t) for t in (texts.tolist() if isinstance(texts, Tensor) else texts)]
        if any(not 0 <= t < len(self) for t in texts):
            raise InputError(f"texts are {texts}; the cache holds texts 0 to {len(self) - 1}")
        for _, storage in self.kinds.values():
            storage.select(texts, self.lengths)
        self.lengths = [self.lengths[t] for t in texts]
        self.ends = [self.ends[t] for t in texts]
        self.columns = self.columns if texts else 0
        return self

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """`select`, by the name that the reference has for it."""
        self.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each text so many times, one after another."""
        self.select([t for t in range(len(self)) for _ in range(repeats)])

    def crop(self, max_length: int) -> Self:
        """Forget all but the first `max_length` tokens of each text, in place; a negative number forgets so many.

        Raises:
            InputError: a local layer no longer holds what tokens before the cut would see. `slack` keeps more.
        """
        self._check_whole()
        wanted = [min(n, max_length) if max_length >= 0 else max(n + max_length, 0) for n in self.lengths]
        spans: list[tuple[int, int, int]] = [
            (i, to, n) for i, (to, n) in enumerate(zip(wanted, self.lengths, strict=True))
        ]
        for reach, storage in self.kinds.values():
            for i, to, length in spans:
                if reach.left is not None and to < length and storage.kept(i, length) > max(0, to - reach.left):
                    raise InputError(
                        f"max_length is {max_length}; a text of {length} tokens can be cropped to "
                        f"{storage.kept(i, length) + reach.left} at the least, because local layers keep a window "
                        "alone. DecoderCache(config, slack=...) keeps more"
                    )
        for _, storage in self.kinds.values():
            held = [(i, max(to, storage.kept(i, n)), n) for i, to, n in spans]
            storage.positions_R[storage.rows(held)] = _NOWHERE
            storage.first = [min(storage.kept(i, n), to) for i, to, n in spans]
        for i, to, length in spans:
            if to < length:
                for _, storage in self.kinds.values():
                    self.ends[i] = int(storage.positions_R[storage.rows([(i, to - 1, to)])]) + 1 if to else 0
        self.columns = max(0, self.columns - max((n - to for _, to, n in spans), default=0))
        self.lengths = wanted
        return self

    def to(self, device: torch.device | str) -> Self:
        """Move to a device, in place."""
        for _, storage in self.kinds.values():
            storage.to(torch.device(device))
        return self

    def copy(self) -> DecoderCache:
        """A cache of its own with the same content, to go on in two ways from one text."""
        return type(self).from_bytes(self.to_bytes(), self.config)

    def to_bytes(self) -> bytes:
        """The whole cache as safetensors, in memory."""
        self._check_whole()
        tensors = {
            "lengths": torch.tensor(self.lengths, dtype=torch.int64),
            "ends": torch.tensor(self.ends, dtype=torch.int64),
        }
        tensors["shape"] = torch.tensor([self.columns, self.slack])
        tensors["model"] = torch.tensor(list(json.dumps(_signature(self.config)).encode()), dtype=torch.uint8)
        for kind, (_, storage) in self.kinds.items():
            tensors[f"{kind}/starts"] = torch.tensor(storage.starts, dtype=torch.int64)
            tensors[f"{kind}/capacities"] = torch.tensor(storage.capacities, dtype=torch.int64)
            tensors[f"{kind}/first"] = torch.tensor(storage.first, dtype=torch.int64)
            tensors[f"{kind}/positions"] = storage.positions_R
            for layer, (k, v) in storage.layers.items():
                tensors[f"{kind}/{layer}/k"], tensors[f"{kind}/{layer}/v"] = k, v
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
        for kind, (_, storage) in cache.kinds.items():
            storage.starts = table(f"{kind}/starts")
            storage.capacities = table(f"{kind}/capacities")
            storage.first = table(f"{kind}/first")
            storage.positions_R = tensors[f"{kind}/positions"]
            numbers = {name.split("/")[1] for name in tensors if name.startswith(f"{kind}/") and name.endswith("/k")}
            for layer in numbers:
                storage.layers[int(layer)] = (tensors[f"{kind}/{layer}/k"], tensors[f"{kind}/{layer}/v"])
            storage.check(cache.lengths, config)
        return cache
