"""Moves rows of keys, values and their gradients: a copy, at the speed of memory, also in an order a head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import padded
from .primitives import LENGTHS

_BLOCK_N = 64


@triton.jit(do_not_specialize=LENGTHS)
def reorder_kernel(
    x, order, y, x_sb, x_sh, x_ss, order_sb, order_sh, kv_len, heads, column_tiles,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y[b, n, h] = x[b, order[b, h, n], h]; y is contiguous."""
    bh = tl.program_id(0) // column_tiles
    b = (bh // heads).to(tl.int64)
    h = bh % heads
    n = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    inside = n < kv_len
    row = tl.load(order + b * order_sb + h.to(tl.int64) * order_sh + n, mask=inside, other=0)
    inside = inside[:, None] & (d < HEAD_DIM)[None, :]
    # [BLOCK_N, BLOCK_D]
    tile = tl.load(x + b * x_sb + h.to(tl.int64) * x_sh + row[:, None] * x_ss + d[None, :], mask=inside, other=0.0)
    at = ((b * kv_len + n) * heads + h) * HEAD_DIM
    tl.store(y + at[:, None] + d[None, :], tile, mask=inside)


def reorder(x: Tensor, order: Tensor) -> Tensor:
    """Rows of x ``[B, S, H, D]`` in the ``order [B|1, H|1, S]``, int64."""
    batch, kv_len, heads, head_dim = x.shape
    y = x.new_empty(x.shape)
    tiles = triton.cdiv(kv_len, _BLOCK_N)
    strides = [order.stride(d) if order.shape[d] > 1 else 0 for d in range(2)]
    with torch.cuda.device_of(x):
        reorder_kernel[(batch * heads * tiles,)](
            x, order, y, x.stride(0), x.stride(2), x.stride(1), *strides, kv_len, heads, tiles,
            HEAD_DIM=head_dim, BLOCK_N=_BLOCK_N, BLOCK_D=padded(head_dim),
        )  # fmt: skip
    return y
