"""Launches the kernels: tensors in, descriptors and lists of tiles worked out, tensors back."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hf_flashmask.attention.backends import describable
from hf_flashmask.attention.plan import TileList, cached
from hf_flashmask.attention.scale import positive_scale, sign
from hf_flashmask.attention.sinks import sink_gradient
from hf_flashmask.attention.triton.launch import (
    BOUNDS_BLOCK,
    LOG2E,
    multiprocessors,
    padded_bounds,
    tile_list,
)
from hf_flashmask.masks import ColumnMask

from .backward import backward_kernel
from .dq_buffer import finish_kernel, prepare_kernel
from .forward import forward_kernel
from .wide_backward import wide_backward_kernel

_BLOCK_M = 128  # two warpgroups of 64 rows
_GLUON_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_BACKWARD_BLOCK_M = 64  # rows of a step of the backward; registers hold no more
_ROW_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
_STATS_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
_DQ_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)


class Config(NamedTuple):
    """``stages`` of K and V in flight, places for Q, columns of a tile, and teams of warps in a program."""

    stages: int
    q_slots: int
    block_n: int
    teams: int


# By width of the tiles: as many stages as 227 KiB hold. Exponentials take as long as products at head dim 64, so more
# warps, whose registers narrow tiles leave room for.
CONFIGS = {
    64: Config(stages=4, q_slots=2, block_n=64, teams=2),
    128: Config(stages=2, q_slots=2, block_n=128, teams=1),
    256: Config(stages=2, q_slots=1, block_n=64, teams=1),
}
_BACKWARD_STAGES = {64: 4, 128: 2, 256: 2}  # of Q and dO
_BACKWARD_BLOCK_N = {64: 128, 128: 128, 256: 64}


def tile_width(head_dim: int, head_dim_v: int) -> int:
    """Columns of the tiles: narrower heads are filled up with zeros by TMA."""
    return max(64, triton.next_power_of_2(max(head_dim, head_dim_v)))


def interval_bounds(mask: ColumnMask) -> Tensor:
    """The bounds with the causal triangle as a bound of its own, so that the kernel knows no causal case.

    int32 ``[masks * C, whole blocks]``: C is 2 for [LTS, Sq) and [0, UTE), 4 for [LTS, LTE) and [UTS, UTE). The mask's
    own where they will do, else made once a mask; columns that do not exist hide every row.
    """
    if not mask.causal:
        return padded_bounds(mask)
    return cached(mask, ("interval bounds", BOUNDS_BLOCK), lambda: _with_triangle(mask))


def _with_triangle(mask: ColumnMask) -> Tensor:
    bounds, kv_len = mask.bounds_without_causal(), mask.kv_len
    padded = torch.nn.functional.pad(bounds, (0, -kv_len % BOUNDS_BLOCK))
    # LTS is 0 there, and this the end: LTE where there is one, else UTE.
    padded[:, :, 1, kv_len:] = 2**31 - 1
    return padded.flatten(0, 2)


def plan_bytes(mask: ColumnMask, head_dim: int, head_dim_v: int, dtype: torch.dtype) -> int:
    """Makes all that a training step needs to know of a mask, anew if the mask is new; its bytes beside the bounds."""
    bounds = interval_bounds(mask)
    size = 0 if bounds.data_ptr() == mask.bounds.data_ptr() else bounds.nbytes
    width = tile_width(head_dim, head_dim_v)
    rows = _lists(mask, by_columns=False, block_n=CONFIGS[width].block_n)
    return size + rows.nbytes + _lists(mask, by_columns=True, block_n=_BACKWARD_BLOCK_N[width]).nbytes


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: ColumnMask, softmax_scale: float, softcap: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q ``[B, Sq, Hq, D]``, k ``[B, Sk, Hkv, D]``, v ``[B, Sk, Hkv, Dv]`` to out ``[B, Sq, Hq, Dv]`` and lse.

    Raises:
        NotImplementedError: the bounds have 2**31 entries or more, or there are too many tiles.
    """
    q, softmax_scale = positive_scale(q, softmax_scale)
    batch, q_len, heads_q, head_dim = q.shape
    head_dim_v = v.shape[3]
    bounds = interval_bounds(mask)
    if bounds.numel() >= 2**31:
        raise NotImplementedError(
            f"backend='hopper' addresses fewer than 2**31 entries of bounds, got {tuple(mask.bounds.shape)}; "
            "use backend='triton'"
        )
    width = tile_width(head_dim, head_dim_v)
    config = CONFIGS[width]
    lists = _lists(mask, by_columns=False, block_n=config.block_n)
    out = q.new_empty(batch, q_len, heads_q, head_dim_v)
    lse = q.new_empty(batch, heads_q, q_len, dtype=torch.float32)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        forward_kernel[(min(multiprocessors(q.device), batch * heads_q * lists.lines),)](
            _descriptor(q, 64, width), _descriptor(k, config.block_n, width), _descriptor(v, config.block_n, width),
            _descriptor(out, 64, width), lse, lse if sinks is None else sinks,
            TensorDescriptor(bounds.flatten(), [bounds.numel()], [1], [config.block_n], _ROW_LAYOUT),
            q_len=q_len, SINKS=sinks is not None, BLOCK_D=width, BLOCK_N=config.block_n, STAGES=config.stages,
            Q_SLOTS=config.q_slots, TEAMS=config.teams, num_warps=4,
            **_common(mask, bounds, lists, q, k, heads_q, config.teams, softmax_scale, softcap),
        )  # fmt: skip
    return out, lse


def backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: ColumnMask,
    softmax_scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and sinks, in their shapes and dtypes; the last bits of q's differ from run to run."""
    given_scale = softmax_scale
    q, softmax_scale = positive_scale(q, softmax_scale)
    do = do if do.stride(-1) == 1 and describable(do) else do.contiguous()
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    batch, q_len, heads_q, head_dim = q.shape
    heads_kv, head_dim_v = v.shape[2:]
    width = tile_width(head_dim, head_dim_v)
    bounds = interval_bounds(mask)
    block_n = _BACKWARD_BLOCK_N[width]
    lists = _lists(mask, by_columns=True, block_n=block_n)
    row_blocks = triton.cdiv(q_len, _BACKWARD_BLOCK_M)
    rows = batch * heads_q * row_blocks
    stats = lse.new_empty(rows * 2, _BACKWARD_BLOCK_M)
    buffer = lse.new_empty(rows * _BACKWARD_BLOCK_M * width // 32, 32)
    shared = {"q_len": q_len, "heads": heads_q, "row_blocks": row_blocks, "BLOCK_M": _BACKWARD_BLOCK_M}
    lse_first = width == 64 and not softcap
    if width == 256:
        kernel, dq_sums, options = wide_backward_kernel, buffer, {}
    else:
        dq_sums = TensorDescriptor(buffer, list(buffer.shape), [32, 1], [128, 32], _DQ_LAYOUT)
        kernel, options = backward_kernel, {"LSE_FIRST": lse_first}
    with torch.cuda.device_of(q):
        prepare_kernel[(rows,)](
            out, do, lse, lse if dlse is None else dlse.contiguous(), stats, buffer, *_strides(out), *_strides(do),
            lse_scale=1 / softmax_scale if lse_first else LOG2E,
            HEAD_DIM_V=head_dim_v, BLOCK_D=width, DLSE=dlse is not None, **shared,
        )  # fmt: skip
        kernel[(min(multiprocessors(q.device), batch * heads_kv * lists.lines),)](
            _descriptor(q, _BACKWARD_BLOCK_M, width), _descriptor(do, _BACKWARD_BLOCK_M, width),
            TensorDescriptor(stats, list(stats.shape), [_BACKWARD_BLOCK_M, 1], [2, _BACKWARD_BLOCK_M], _STATS_LAYOUT),
            _descriptor(k, 64, width), _descriptor(v, 64, width), dq_sums,
            _descriptor(dk, 64, width), _descriptor(dv, 64, width), bounds,
            row_blocks=row_blocks, softmax_scale=softmax_scale, BLOCK_M=_BACKWARD_BLOCK_M, BLOCK_N=block_n,
            ONE_MASK=heads_q // mask.shape[1] % (heads_q // heads_kv) == 0, BLOCK_D=width,
            STAGES=_BACKWARD_STAGES[width], num_warps=4, **options,
            **_common(mask, bounds, lists, q, k, heads_kv, 1, softmax_scale, softcap),
        )  # fmt: skip
        finish_kernel[(rows,)](
            buffer, dq, *_strides(dq), scale=softmax_scale * sign(given_scale), HEAD_DIM=head_dim, BLOCK_D=width,
            **shared,
        )  # fmt: skip
    if sinks is None:
        return dq, dk, dv, None
    delta = stats.view(batch, heads_q, row_blocks, 2, _BACKWARD_BLOCK_M)[:, :, :, 1].flatten(2)[..., :q_len]
    return dq, dk, dv, sink_gradient(sinks, lse, -delta)


def _lists(mask: ColumnMask, by_columns: bool, block_n: int) -> TileList:
    return tile_list(mask, _BACKWARD_BLOCK_M if by_columns else _BLOCK_M, block_n, by_columns=by_columns)


def _common(
    mask: ColumnMask, bounds: Tensor, lists: TileList, q: Tensor, k: Tensor, heads: int, teams: int,
    softmax_scale: float, softcap: float,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of either kernel. ``heads`` are those that there is work for: of queries forward, of keys backward."""
    at_once = multiprocessors(q.device) * teams
    masks_b, masks_h = mask.shape[:2]
    batch, heads_q, heads_kv = q.shape[0], q.shape[2], k.shape[2]
    return {
        "spans": lists.spans, "counts": lists.counts, "order": lists.order, "counter": lists.order.new_zeros(1),
        "bounds_len": bounds.shape[1], "lines": lists.lines, "capacity": lists.capacity,
        "heads_total": batch * heads, "heads": heads, "group": heads_q // heads_kv,
        # As few heads at a time as give all something to do, so that what they read and add to stays in L2.
        "head_group": max(1, at_once // lists.lines),
        "mask_stride": masks_h if masks_b > 1 else 0, "mask_heads": heads_q // masks_h,
        # Scores become powers of two, since exp2 is what the hardware has.
        "qk_scale": (softcap or softmax_scale) * LOG2E, "cap_scale": softmax_scale / softcap if softcap else 0.0,
        "NUM_BOUNDS": bounds.shape[0] // (masks_b * masks_h), "SOFTCAP": bool(softcap),
    }  # fmt: skip


def _strides(t: Tensor) -> list[int]:
    """Of batch, head and row."""
    return [t.stride(0), t.stride(2), t.stride(1)]


def _descriptor(t: Tensor, rows: int, width: int) -> TensorDescriptor:
    """``[B, H, S, D]`` view of t, in boxes of ``rows`` x ``width``; what lies beyond t reads as zeros."""
    batch, length, heads, head_dim = t.shape
    # A stride that is never taken still has to be valid.
    strides = [t.stride(d) if t.shape[d] > 1 else 16 for d in (0, 2, 1)]
    block = [1, 1, rows, width]
    return TensorDescriptor(t, [batch, heads, length, head_dim], [*strides, 1], block, _layout(rows, width, t.dtype))


@functools.cache  # working it out takes longer than all the rest of a descriptor
def _layout(rows: int, width: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, width], _GLUON_TYPES[dtype])
