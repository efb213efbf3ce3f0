"""Keys and values as other libraries keep them: one padded pair a layer, read from an object that is handed in.

Shapes: B texts, H heads, P columns that are held, W new columns, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modernbert.config import Config
from modernbert.decoding.cache import DecoderCache
from modernbert.decoding.continuation import Continuation
from modernbert.errors import InputError
from modernbert.nn.packing import Packing


class Mirrored(DecoderCache):
    """A cache that was read from another library's object, which gets every new token too."""

    owner: Any = None
    _new_BW: Tensor | None = None  # which of the new columns are real

    def begin(self, packing: Packing, *args: Any, **kwargs: Any) -> dict[str, Continuation]:
        """Take note of the new columns: those of the grid, or texts that end together."""
        if packing.grid is not None and packing.indices_T is not None:
            mask = torch.zeros(packing.grid[0] * packing.grid[1], dtype=torch.bool)
            self._new_BW = mask.index_fill(0, packing.indices_T.cpu(), True).view(packing.grid)
        else:
            width = max(packing.lengths, default=0)
            self._new_BW = torch.tensor([[i >= width - n for i in range(width)] for n in packing.lengths])
        return super().begin(packing, *args, **kwargs)

    def finish(self) -> None:
        """Count the new tokens, and hand them over."""
        super().finish()
        if hasattr(self.owner, "update") and self._new_BW is not None:
            for layer in range(len(self)):
                k, v = self.padded(layer, self._new_BW)
                self.owner.update(k, v, layer)

    def copy(self) -> DecoderCache:
        """A cache of its own, whose new tokens go nowhere else."""
        return DecoderCache.from_bytes(self.to_bytes(), self.configured)


def read_cache(given: Any, config: Config, mask_BS: Tensor | None = None) -> DecoderCache:
    """A cache of what another library's object, or a tuple of pairs, holds; such an object gets new tokens too.

    Args:
        given: pairs of keys and values, (B, H, P, D) of each layer, or an object that has them: one of local layers may
            hold the last columns alone. Keys are rotated by the places of tokens in their texts.
        config: of the model.
        mask_BS: which columns are real tokens, those held first; None means all.

    Raises:
        InputError: it holds none, or not of this model.
    """
    pairs = _pairs(given)
    cache = Mirrored(config)
    cache.owner = given
    if not pairs:
        return cache
    heads = [config.num_attention_heads - len(config.pruned_heads.get(i, [])) for i in range(config.num_hidden_layers)]
    wanted = [(n, config.head_dim) for n in heads]
    if [(k.shape[1], k.shape[3]) for k, _ in pairs] != wanted:
        raise InputError(
            f"past_key_values holds {len(pairs)} layers of {tuple(pairs[0][0].shape[1::2])} heads and head size; the "
            f"model has {len(wanted)} of {wanted[0]}"
        )
    length = getattr(given, "get_seq_length", None)
    columns = int(length()) if length else max(k.shape[2] for k, _ in pairs)
    texts, device = len(pairs[0][0]), pairs[0][0].device
    real = torch.ones((texts, columns), dtype=torch.bool)
    if mask_BS is not None and mask_BS.shape[0] == texts and mask_BS.shape[1] >= columns:
        real = mask_BS[:, :columns].ne(0).cpu()
    at = [row.nonzero()[:, 0].tolist() for row in real]  # the column of each token of a text
    cache.lengths = cache.ends = [len(columns_of) for columns_of in at]
    cache.columns = columns
    for kind, storage in cache.kinds.items():
        layers = [i for i, of in enumerate(config.layer_types or ()) if of == kind]
        first = max(max(0, columns - pairs[i][0].shape[2]) for i in layers)  # column that is held
        kept = [max(sum(c < first for c in row), len(row) - (storage.ring or len(row))) for row in at]
        left = storage.reach.left
        if any(k > max(0, len(row) - (len(row) if left is None else left)) for k, row in zip(kept, at, strict=True)):
            raise InputError("past_key_values no longer holds what local layers see; make a new one")
        storage.make_room([0] * texts, cache.lengths)
        storage.to(device)
        storage.regions = [region._replace(first=k) for region, k in zip(storage.regions, kept, strict=True)]
        spans = [(region, k, len(row)) for region, k, row in zip(storage.regions, kept, at, strict=True)]
        slots = storage.slots(spans)
        places = [i for k, row in zip(kept, at, strict=True) for i in range(k, len(row))]
        storage.positions_R.index_copy_(0, slots, torch.tensor(places, device=device).long())
        for i in layers:
            behind = max(0, columns - pairs[i][0].shape[2])
            held = enumerate(zip(kept, at, strict=True))
            rows = [(text, column - behind) for text, (k, row) in held for column in row[k:]]
            text_T, column_T = torch.tensor(rows, device=device).long().view(-1, 2).T
            k_THD, v_THD = (x[text_T, :, column_T] for x in pairs[i])
            storage.write(i, k_THD, v_THD, slots, None)
    return cache


def _pairs(given: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer; none where nothing is held yet."""
    pairs: list[tuple[Any, Any]] = [(None, None)]
    if (layers := getattr(given, "layers", None)) is not None:
        pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    elif hasattr(given, "key_cache"):
        pairs = list(zip(given.key_cache, given.value_cache, strict=True))
    elif isinstance(given, tuple | list) and all(isinstance(pair, tuple | list) and len(pair) >= 2 for pair in given):
        pairs = [(pair[0], pair[1]) for pair in given]
    held = [(k, v) for k, v in pairs if isinstance(k, Tensor) and isinstance(v, Tensor) and k.numel()]
    if len(held) not in (0, len(pairs)) or (pairs and not held and layers is None):
        raise InputError(
            f"past_key_values is a {type(given).__name__}; it must be a DecoderCache, or hold keys and values of "
            "each layer"
        )
    return held
