"""``sort_keys=True``: keys and values in the order in which the mask hides them, for tiles to be hidden whole."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from hf_flashmask.masks import ColumnMask

from .backends import moves_with_triton
from .plan import cached


class KeyOrder(NamedTuple):
    """A mask with its columns sorted; where they were and, the ``inverse``, where they went: ``[B|1, Hm|1, Sk]``."""

    mask: ColumnMask
    order: Tensor
    inverse: Tensor


def find(mask: ColumnMask) -> KeyOrder:
    """Found once a mask, so that all layers and the backward share it and what is planned for it."""

    def make() -> KeyOrder:
        sorted_mask, order = mask.sort_columns()
        return KeyOrder(sorted_mask, order, order.argsort(dim=-1))

    return cached(mask, "sorted keys", make)


def sort(mask: ColumnMask, k: Tensor, v: Tensor) -> tuple[ColumnMask, Tensor, Tensor, Tensor]:
    """(mask, k, v) with keys moved, and the inverse order, for what comes back to them."""
    sorted_mask, order, inverse = find(mask)
    return sorted_mask, move(k, order), move(v, order), inverse


def move(x: Tensor, order: Tensor) -> Tensor:
    """Rows of x ``[B, S, H, D]`` in the ``order [B|1, H|1, S]``."""
    if moves_with_triton(x):
        from .triton.reorder import reorder

        return reorder(x, order)
    if order.shape[:2] == (1, 1):
        return x.index_select(1, order[0, 0])
    return x.gather(1, order.transpose(1, 2).unsqueeze(3).expand_as(x))
