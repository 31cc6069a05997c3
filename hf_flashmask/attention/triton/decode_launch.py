"""Launches the kernels for few queries. Shapes alone decide how, so a CUDA graph holds for whatever the bounds hide."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from hf_flashmask.masks import ColumnMask

from .configs import Config, padded
from .decode import combine_kernel, decode_kernel
from .launch import LOG2E, multiprocessors, positive_scale, precision, with_room

# Longer queries fill the ordinary kernel's tiles.
MAX_Q_LEN = 16
# Programs that a multiprocessor runs at once.
_RESIDENT = 2
# Fewest blocks of keys in a split, and most splits of what fills the device without.
_LEAST_BLOCKS, _MOST_SPLITS = 2, 8
# Blocks of keys that a program looks at together: at most the 8 that its bits are for.
BLOCKS = 8
# Partial results that the second kernel loads at once, few or many.
_COMBINED = (8, 64)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: ColumnMask, softmax_scale: float, softcap: float, sinks: Tensor | None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q ``[B, Sq, Hq, D]`` of up to 16 rows, k and v of any strides, to out ``[B, Sq, Hq, Dv]`` and lse.

    What the bounds hide from all rows is not read: keys behind the last visible one, and whole blocks of keys before.
    With a ``block_table``, int32 ``[B, W]``, k and v are pages ``[P, page, Hkv, D]``, of ``PAGE`` keys or a multiple.
    """
    q, softmax_scale = positive_scale(q, softmax_scale)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)

    def run(config: Config) -> None:
        _launch(config, q, k, v, mask, softmax_scale, softcap, sinks, block_table, out, lse)

    rows = q.shape[1] * (q.shape[2] // k.shape[2])
    with_room("decode" if rows <= 16 else "draft", q.shape[3], v.shape[3], q.dtype, q.device, run)
    return out, lse


class _Division(NamedTuple):
    """Of the work: rows of a tile, tiles of rows a key head, splits of the keys, chunks of BLOCKS blocks a split."""

    block_m: int
    row_tiles: int
    splits: int
    chunks: int


@functools.lru_cache(4096)  # the layers of a step are alike
def divide(heads_total: int, rows: int, kv_len: int, config: Config, device: torch.device) -> _Division:
    """The work of ``heads_total`` key heads, each with ``rows`` rows: query heads that share it times query rows."""
    block_m = min(config.block_m, max(16, triton.next_power_of_2(rows)))
    row_tiles = triton.cdiv(rows, block_m)
    blocks = triton.cdiv(kv_len, config.block_n)
    splits = splits_of(heads_total * row_tiles, blocks, multiprocessors(device) * _RESIDENT)
    return _Division(block_m, row_tiles, splits, triton.cdiv(blocks, splits * BLOCKS))


def splits_of(programs: int, blocks: int, slots: int) -> int:
    """Into how many parts the ``blocks`` of keys of each of ``programs`` tiles of rows are split.

    So that the programs fill whole rounds of the device's ``slots``: the fewest within 3 % of the best.
    """
    most = max(1, min(blocks // _LEAST_BLOCKS, max(slots // programs, _MOST_SPLITS)))
    filled = [programs * s / slots / math.ceil(programs * s / slots) for s in range(1, most + 1)]
    return next(s for s, share in enumerate(filled, 1) if share >= 0.97 * max(filled))


def _launch(
    config: Config,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: ColumnMask,
    softmax_scale: float,
    softcap: float,
    sinks: Tensor | None,
    block_table: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    (batch, q_len, heads_q, head_dim), (_, page, heads, head_dim_v) = q.shape, v.shape
    kv_len = mask.kv_len
    group = heads_q // heads
    rows = q_len * group
    work = divide(batch * heads, rows, kv_len, config, q.device)
    partial = q.new_empty(batch * heads, rows, work.splits, head_dim_v, dtype=torch.float32)
    partial_lse = q.new_empty(batch * heads, rows, work.splits, dtype=torch.float32)
    bounds = mask.bounds if mask.bounds.stride(3) == 1 else mask.bounds.contiguous()
    masks_b, masks_h, vectors, _ = bounds.shape
    per_row = masks_h > heads
    strides = [t.stride(d) if t.shape[d] > 1 else 0 for t in (q, k, v) for d in (0, 2, 1)]
    arguments = (
        q, k, v, bounds, bounds if block_table is None else block_table, partial, partial_lse, *strides,
        bounds.stride(0) if masks_b > 1 else 0,
        bounds.stride(1) * (group if per_row else 1) if masks_h > 1 else 0,
        bounds.stride(1) if per_row else 0,
        bounds.stride(2),
        0 if block_table is None else block_table.stride(0), page,
        q_len, kv_len, heads, group, group if per_row else 1, work.splits, work.chunks, work.row_tiles,
        (softcap or softmax_scale) * LOG2E, softmax_scale / softcap if softcap else 0.0,
    )  # fmt: skip
    constants = (
        head_dim, head_dim_v, padded(head_dim), padded(head_dim_v), work.block_m, config.block_n, BLOCKS,
        mask.causal, vectors, per_row, bool(softcap), block_table is not None, precision(q.dtype), config.num_stages,
    )  # fmt: skip
    options: dict[str, Any] = {
        "num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True
    }  # fmt: skip
    # What Triton would specialize on, other than types: with all of it the same, so is the kernel.
    alike = all(s % 16 == 0 and s < 2**31 for s in strides) and bounds.numel() < 2**31
    alike = alike and all(t.data_ptr() % 16 == 0 for t in (q, k, v, bounds))
    alike = alike and (block_table is None or block_table.data_ptr() % 16 == 0)
    key = (q.device.index, q.dtype, constants, config) if alike else None
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _run(decode_kernel, batch * heads * work.row_tiles * work.splits, key, arguments, constants, options)
        _combine(partial, partial_lse, out, lse, sinks, q_len, heads, group, work.splits)


def _combine(
    partial: Tensor, partial_lse: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None, q_len: int, heads: int,
    group: int, splits: int,
) -> None:  # fmt: skip
    head_dim_v = out.shape[3]
    given = lse if sinks is None else sinks
    combined = next((n for n in _COMBINED if n >= splits), _COMBINED[-1])
    constants = (head_dim_v, padded(head_dim_v), sinks is not None, combined)
    key = (out.device.index, out.dtype, given.dtype, constants) if given.data_ptr() % 16 == 0 else None
    arguments = (partial, partial_lse, out, lse, given, q_len, heads, group, splits)
    _run(combine_kernel, partial.shape[0] * partial.shape[1], key, arguments, constants, {"num_warps": 4})


_compiled: dict[Hashable, CompiledKernel] = {}


def _run(
    kernel: Any, programs: int, key: Hashable, arguments: tuple[Any, ...], constants: tuple[Any, ...],
    options: dict[str, Any],
) -> None:  # fmt: skip
    """Launch a kernel. Triton looks at every argument to find what it compiled, which takes the host longer than the
    device takes for a short cache; with a ``key`` that was met before, it is found by that.
    """
    known = None if key is None else _compiled.get(key)
    if known is not None:
        known[programs, 1, 1](*arguments, *constants)
        return
    compiled = kernel[(programs,)](*arguments, *constants, **options)
    if key is not None and isinstance(compiled, CompiledKernel):  # the interpreter has none
        _compiled[key] = compiled
