"""Launches the kernels for few queries. Shapes alone decide how, so a CUDA graph holds for whatever the bounds hide.

In eager generation the host is what takes the time, so all but the addresses is worked out once for calls that are
alike (``Plan``): the layers of a step.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from hf_flashmask.attention.scale import positive_scale
from hf_flashmask.masks import ColumnMask

from .configs import Config, padded
from .decode import INVERSE_BITS, MAX_GROUP, combine_kernel, decode_kernel
from .launch import LOG2E, has_pdl, multiprocessors, precision, with_room

# Longer queries fill the ordinary kernel's tiles.
MAX_Q_LEN = 16
# Fewest blocks of keys in a split, and most splits of what fills the device without.
_LEAST_BLOCKS, _MOST_SPLITS = 4, 8
# Stages where two programs share a multiprocessor (see ``_launch``).
_SHARED_STAGES = 3
# Blocks of keys that a program looks at together: at most the 16 that its bits are for.
BLOCKS = 16
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
    return start(q, k, v, mask, softmax_scale, softcap, sinks, block_table)[:2]


def start(
    q: Tensor, k: Tensor, v: Tensor, mask: ColumnMask, softmax_scale: float, softcap: float, sinks: Tensor | None,
    block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor, Plan | None]:  # fmt: skip
    """``forward``, and with what calls can be repeated that differ in nothing but the addresses of their tensors."""
    given_scale = softmax_scale
    q, softmax_scale = positive_scale(q, softmax_scale)
    bounds = mask.bounds if mask.bounds.stride(3) == 1 else mask.bounds.contiguous()
    plans: list[Plan] = []
    results: list[tuple[Tensor, Tensor]] = []

    def run(config: Config) -> None:
        plan = Plan(config, q, k, v, bounds, mask, softmax_scale, softcap, sinks, block_table)
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
        out = plan.again(q, k, v, sinks, lse) if plan.repeatable else None
        results.append((plan.first(q, k, v, bounds, sinks, block_table, lse) if out is None else out, lse))
        plans.append(plan)

    rows = q.shape[1] * (q.shape[2] // k.shape[2])
    with_room("decode" if rows <= 16 else "draft", q.shape[3], v.shape[3], q.dtype, q.device, run)
    # A sign that went into q, or bounds that were copied, belong to this call; so does how float32 is multiplied.
    alike = given_scale == softmax_scale and bounds is mask.bounds and q.dtype != torch.float32
    return *results[0], plans[0] if alike and plans[0].repeatable else None


def splits_of(programs: int, blocks: int, slots: int) -> int:
    """Into how many parts the ``blocks`` of keys of each of ``programs`` tiles of rows are split.

    So that the programs fill whole rounds of the device's ``slots``: the fewest within a tenth of the best, since every
    program begins by waiting for memory, and parts have to be combined.
    """
    most = max(1, min(blocks // _LEAST_BLOCKS, max(slots // programs, _MOST_SPLITS)))
    filled = [programs * s / slots / math.ceil(programs * s / slots) for s in range(1, most + 1)]
    return next(s for s, share in enumerate(filled, 1) if share >= 0.9 * max(filled))


class _Launch(NamedTuple):
    """What calls have in common whose caches are about as long: of both kernels the grid, the constants, and a key.

    The key is what Triton would specialize on, other than types: with all of it the same, so is the kernel.
    """

    splits: int
    row_tiles: int
    parts: int
    scratch: int  # floats before lse
    grid: tuple[int, int]
    constants: tuple[Any, ...]
    key: Hashable
    combine_grid: tuple[int, int]
    combine_constants: tuple[Any, ...]
    combine_key: Hashable


@functools.lru_cache(1024)  # a cache grows by a key a step, by a block rarely
def _launch(
    config: Config, batch: int, q_len: int, heads: int, group: int, head_dim: int, head_dim_v: int, blocks: int,
    causal: bool, vectors: int, per_row: bool, uneven: bool, softcap: bool, paged: bool, dtype: torch.dtype,
    sinks: torch.dtype | None, device: torch.device, precision: str,
) -> _Launch:  # fmt: skip
    if group > MAX_GROUP:
        raise NotImplementedError(f"at most {MAX_GROUP} query heads can share a key head, got {group}")
    rows = q_len * group
    block_m = min(config.block_m, max(16, 1 << (rows - 1).bit_length()))
    row_tiles = -(-rows // block_m)
    # One program a multiprocessor saturates memory; where batch rows see more and fewer keys, a second evens them out.
    slots = multiprocessors(device) * (2 if uneven else 1)
    splits = splits_of(batch * heads * row_tiles, blocks, slots)
    whole, pdl = splits == 1, has_pdl(device)
    parts = 0 if whole else batch * heads * rows * splits
    constants = (
        head_dim, head_dim_v, padded(head_dim), padded(head_dim_v), block_m, config.block_n, BLOCKS, causal, vectors,
        per_row, softcap, paged, precision, config.num_stages, whole, whole and sinks is not None, pdl and not whole,
    )  # fmt: skip
    combined = next((n for n in _COMBINED if n >= splits), _COMBINED[-1])
    combine_constants = (head_dim_v, padded(head_dim_v), sinks is not None, combined, pdl)
    return _Launch(
        splits, row_tiles, parts, -(-parts * (head_dim_v + 1) // 4) * 4,
        (batch * heads * row_tiles, splits), constants, ("decode", device.index, dtype, sinks, constants, config),
        (batch * heads * rows, 0 if whole else 1), combine_constants,
        ("combine", device.index, dtype, sinks, combine_constants),
    )  # fmt: skip


class Plan:
    """All of the launches of one call but the addresses of its tensors."""

    __slots__ = ("_bounds", "_combine", "_combine_rest", "_decode", "_device", "_launch", "_options", "_rest", "_shape")

    def __init__(
        self, config: Config, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, mask: ColumnMask, softmax_scale: float,
        softcap: float, sinks: Tensor | None, block_table: Tensor | None,
    ) -> None:  # fmt: skip
        (batch, q_len, heads_q, head_dim), (_, page, heads, head_dim_v) = q.shape, v.shape
        kv_len = mask.kv_len
        group = heads_q // heads
        masks_b, masks_h, vectors, _ = bounds.shape
        per_row = masks_h > heads
        uneven = masks_b > 1
        if uneven:
            config = config._replace(num_stages=min(config.num_stages, _SHARED_STAGES))
        launch = self._launch = _launch(
            config, batch, q_len, heads, group, head_dim, head_dim_v, -(-kv_len // config.block_n), mask.causal,
            vectors, per_row, uneven, bool(softcap), block_table is not None, q.dtype,
            None if sinks is None else sinks.dtype, q.device, precision(q.dtype),
        )  # fmt: skip
        strides: list[int] = []
        for t in (q, k, v):
            shape, stride = t.shape, t.stride()
            strides += (stride[d] if shape[d] > 1 else 0 for d in (0, 2, 1))
        divisor = (heads, group, -(-(1 << INVERSE_BITS.value) // group))
        self._rest = (
            *strides,
            bounds.stride(0) if masks_b > 1 else 0,
            bounds.stride(1) * (group if per_row else 1) if masks_h > 1 else 0,
            bounds.stride(1) if per_row else 0,
            bounds.stride(2),
            0 if block_table is None else block_table.stride(0), page, q_len, kv_len, mask.full_prefix,
            *divisor, group if per_row else 1, launch.parts, launch.splits, launch.row_tiles,
            (softcap or softmax_scale) * LOG2E, softmax_scale / softcap if softcap else 0.0, *launch.constants,
        )  # fmt: skip
        self._combine_rest = (q_len, *divisor, launch.parts, launch.splits, *launch.combine_constants)
        self._options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
        self._device = q.device.index
        self._shape = (batch, q_len, heads_q, head_dim_v)
        self._bounds = (bounds.data_ptr(), (bounds if block_table is None else block_table).data_ptr())
        self._decode: CompiledKernel | None = None
        self._combine: CompiledKernel | None = None
        every_bit = functools.reduce(operator.or_, (*strides, *self._bounds))
        if every_bit % 16 == 0 and max(*strides, bounds.numel()) < 2**31:
            self._decode, self._combine = _compiled.get(launch.key), _compiled.get(launch.combine_key)
        else:
            self._launch = launch._replace(key=None)

    @property
    def repeatable(self) -> bool:
        return self._decode is not None and (self._combine is not None or not self._launch.combine_grid[1])

    def first(
        self, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, sinks: Tensor | None, block_table: Tensor | None,
        lse: Tensor,
    ) -> Tensor:  # fmt: skip
        """out, and lse written; by whatever Triton finds for the arguments, compiled if need be."""
        launch = self._launch
        out = q.new_empty(self._shape)
        partial = q.new_empty(launch.scratch, dtype=torch.float32) if launch.parts else lse
        given = lse if sinks is None else sinks
        aligned = all(t.data_ptr() % 16 == 0 for t in (q, k, v, given))
        tables = (bounds, bounds if block_table is None else block_table)
        arguments = (q, k, v, *tables, partial, out, lse, given, *self._rest)
        with torch.cuda.device_of(q):  # Triton launches on the current device
            key = launch.key if aligned else None
            self._decode = _run(decode_kernel, launch.grid, key, arguments, self._options)
            if launch.parts:
                key = launch.combine_key if aligned else None
                options = {"num_warps": 4} | ({"launch_pdl": True} if launch.combine_constants[-1] else {})
                arguments = (partial, out, lse, given, *self._combine_rest)
                self._combine = _run(combine_kernel, launch.combine_grid, key, arguments, options)
        return out

    def again(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, lse: Tensor | None = None
    ) -> Tensor | None:  # fmt: skip
        """out by the kernels of a call like this one, under the same bounds; None if an address is not aligned."""
        at = (q.data_ptr(), k.data_ptr(), v.data_ptr(), 0 if sinks is None else sinks.data_ptr())
        if (at[0] | at[1] | at[2] | at[3]) & 15:
            return None
        launch = self._launch
        out = q.new_empty(self._shape)
        batch, q_len, heads_q, _ = self._shape
        scratch = q.new_empty(launch.scratch + batch * q_len * heads_q, dtype=torch.float32)
        partial_at = scratch.data_ptr()
        lse_at = partial_at + 4 * launch.scratch if lse is None else lse.data_ptr()
        to = (out.data_ptr(), lse_at, at[3] or lse_at)
        device = self._device
        with _NOWHERE if torch.cuda.current_device() == device else torch.cuda.device(device):
            stream = _current_stream()(device)
            _start(self._decode, launch.grid, stream, (*at[:3], *self._bounds, partial_at, *to, *self._rest))
            if launch.parts:
                _start(self._combine, launch.combine_grid, stream, (partial_at, *to, *self._combine_rest))
        return out


_NOWHERE = contextlib.nullcontext()


@functools.cache
def _current_stream() -> Callable[[int], int]:
    current: Callable[[int], int] = driver.active.get_current_stream
    return current


# By what Triton would specialize on.
_compiled: dict[Hashable, CompiledKernel] = {}


def _run(
    kernel: Any, grid: tuple[int, int], key: Hashable, arguments: tuple[Any, ...], options: dict[str, Any]
) -> CompiledKernel | None:  # fmt: skip
    """Launch a kernel as Triton does, which looks at every argument to find what it compiled: that takes the host
    longer than a short cache takes the device. With a ``key`` it is remembered and returned.
    """
    compiled = kernel[grid](*arguments, **options)
    if key is None or not isinstance(compiled, CompiledKernel):  # the interpreter has none
        return None
    return _compiled.setdefault(key, compiled)


def _start(kernel: Any, grid: tuple[int, int], stream: int, arguments: tuple[Any, ...]) -> None:
    """``kernel[*grid, 1](*arguments)``, without what only profilers want to know."""
    if knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls:
        kernel[(*grid, 1)](*arguments)
        return
    kernel.run(*grid, 1, stream, kernel.function, kernel.packed_metadata, None, None, None, *arguments)
