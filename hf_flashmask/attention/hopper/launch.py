"""Launches the forward kernel: tensors in, descriptors and lists of tiles worked out, tensors back."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hf_flashmask.attention.plan import cached
from hf_flashmask.attention.triton import plan_bytes as portable_plan_bytes
from hf_flashmask.attention.triton.launch import BOUNDS_BLOCK, padded_bounds, positive_scale, tile_list
from hf_flashmask.masks import ColumnMask

from .forward import forward_kernel

_LOG2E = 1.4426950408889634
_BLOCK_M = 128  # two warpgroups of 64 rows
_BLOCK_N = 128  # a thread of a warpgroup for each column's bounds
_GLUON_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_ROW_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


class Config(NamedTuple):
    """``stages`` K and V tiles in flight; ``head_group`` heads share L2."""

    stages: int
    head_group: int


# By width of the tiles: as many stages as 227 KiB hold.
CONFIGS = {64: Config(4, 8), 128: Config(2, 8)}


def tile_width(head_dim: int, head_dim_v: int) -> int:
    """Columns of the tiles: narrower heads are filled up with zeros by TMA."""
    return 64 if max(head_dim, head_dim_v) <= 64 else 128


def interval_bounds(mask: ColumnMask) -> Tensor:
    """The bounds with the causal triangle as a bound of its own, so that the kernel knows no causal case.

    int32 ``[masks * C, whole blocks]``: C is 2 for [LTS, Sq) and [0, UTE), 4 for [LTS, LTE) and [UTS, UTE). The mask's
    own where they will do, else made once a mask; columns that do not exist hide every row.
    """
    if not mask.causal:
        return padded_bounds(mask)
    return cached(mask, ("interval bounds", BOUNDS_BLOCK), lambda: _with_triangle(mask))


def _with_triangle(mask: ColumnMask) -> Tensor:
    bounds, kv_len = mask.bounds, mask.kv_len
    batch, heads, vectors, _ = bounds.shape
    padded = bounds.new_zeros(batch, heads, 2 * vectors, triton.cdiv(kv_len, BOUNDS_BLOCK) * BOUNDS_BLOCK)
    padded[:, :, :vectors, :kv_len] = bounds
    first_visible = torch.arange(kv_len, dtype=torch.int32, device=bounds.device) - (kv_len - mask.q_len)
    padded[:, :, -1, :kv_len] = first_visible
    # LTS is 0 there, and this the end: LTE where there is one, else UTE.
    padded[:, :, 1, kv_len:] = 2**31 - 1
    return padded.flatten(0, 2)


def plan_bytes(mask: ColumnMask, head_dim: int, head_dim_v: int, dtype: torch.dtype) -> int:
    """Makes all that a training step needs to know of a mask, anew if the mask is new; its bytes beside the bounds."""
    bounds = interval_bounds(mask)
    size = 0 if bounds.data_ptr() == mask.bounds.data_ptr() else bounds.nbytes
    size += tile_list(mask, _BLOCK_M, _BLOCK_N, by_columns=False).nbytes
    return size + portable_plan_bytes(mask, head_dim, head_dim_v, dtype)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: ColumnMask, softmax_scale: float, softcap: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q ``[B, Sq, Hq, D]``, k ``[B, Sk, Hkv, D]``, v ``[B, Sk, Hkv, Dv]`` to out ``[B, Sq, Hq, Dv]`` and lse.

    Raises:
        NotImplementedError: the bounds have 2**31 entries or more, or there are too many tiles.
    """
    q, softmax_scale = positive_scale(q, softmax_scale)
    batch, q_len, heads_q, head_dim = q.shape
    heads_kv, head_dim_v = k.shape[2], v.shape[3]
    bounds = interval_bounds(mask)
    if bounds.numel() >= 2**31:
        raise NotImplementedError(
            f"backend='hopper' addresses fewer than 2**31 entries of bounds, got {tuple(mask.bounds.shape)}; "
            "use backend='triton'"
        )
    width = tile_width(head_dim, head_dim_v)
    config = CONFIGS[width]
    lists = tile_list(mask, _BLOCK_M, _BLOCK_N, by_columns=False)
    out = q.new_empty(batch, q_len, heads_q, head_dim_v)
    lse = q.new_empty(batch, heads_q, q_len, dtype=torch.float32)
    masks_b, masks_h = mask.shape[:2]
    with torch.cuda.device_of(q):  # Triton launches on the current device
        forward_kernel[(min(_multiprocessors(q.device), batch * heads_q * lists.lines),)](
            _descriptor(q, 64, width), _descriptor(k, _BLOCK_N, width), _descriptor(v, _BLOCK_N, width),
            _descriptor(out, 64, width), lse, lse if sinks is None else sinks,
            TensorDescriptor(bounds.flatten(), [bounds.numel()], [1], [_BLOCK_N], _ROW_LAYOUT),
            lists.spans, lists.counts, lists.order, lists.order.new_zeros(1),
            q_len=q_len, bounds_len=bounds.shape[1], lines=lists.lines, capacity=lists.capacity,
            heads_total=batch * heads_q, heads=heads_q, group=heads_q // heads_kv,
            mask_stride=masks_h if masks_b > 1 else 0, mask_heads=heads_q // masks_h,
            # Scores become powers of two, since exp2 is what the hardware has.
            qk_scale=(softcap or softmax_scale) * _LOG2E, cap_scale=softmax_scale / softcap if softcap else 0.0,
            BLOCK_D=width, BLOCK_N=_BLOCK_N, STAGES=config.stages,
            NUM_BOUNDS=bounds.shape[0] // (masks_b * masks_h), SOFTCAP=bool(softcap), SINKS=sinks is not None,
            HEAD_GROUP=config.head_group, num_warps=4,
        )  # fmt: skip
    return out, lse


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _descriptor(t: Tensor, rows: int, width: int) -> TensorDescriptor:
    """``[B, H, S, D]`` view of t, in boxes of ``rows`` x ``width``; what lies beyond t reads as zeros."""
    batch, length, heads, head_dim = t.shape
    # A stride that is never taken still has to be valid.
    strides = [t.stride(d) if t.shape[d] > 1 else 16 for d in (0, 2, 1)]
    block = [1, 1, rows, width]
    layout = gl.NVMMASharedLayout.get_default_for(block, _GLUON_TYPES[t.dtype])
    return TensorDescriptor(t, [batch, heads, length, head_dim], [*strides, 1], block, layout)
