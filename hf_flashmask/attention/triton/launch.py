"""Launches the kernels: tensors in, strides, descriptors and configurations worked out, tensors back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_flashmask.attention.backends import describable
from hf_flashmask.attention.plan import TileList, cached
from hf_flashmask.attention.scale import positive_scale, sign
from hf_flashmask.attention.sinks import sink_gradient
from hf_flashmask.masks import ColumnMask

from . import configs, plan
from .backward import dkdv_kernel, dq_kernel
from .configs import Config, padded
from .forward import forward_kernel

LOG2E = 1.4426950408889634
# Bounds and row statistics are padded to whole blocks of any configuration.
BOUNDS_BLOCK = 128


def tile_list(mask: ColumnMask, block_m: int, block_n: int, *, by_columns: bool) -> TileList:
    """The list that a kernel walks, made once a mask: all layers and recomputations share it."""

    def build() -> TileList:
        with torch.cuda.device_of(mask.bounds):
            return plan.build(mask, block_m, block_n, by_columns=by_columns)

    return cached(mask, ("tiles", block_m, block_n, by_columns), build)


def padded_bounds(mask: ColumnMask) -> Tensor:
    """int32 ``[masks * C, whole blocks]``: the mask's own bounds where they will do, else a copy made once a mask."""
    bounds = mask.bounds
    if bounds.is_contiguous() and mask.kv_len % BOUNDS_BLOCK == 0 and bounds.data_ptr() % 16 == 0:
        return bounds.flatten(0, 2)
    return cached(mask, ("bounds", BOUNDS_BLOCK), lambda: plan.pad_bounds(mask, BOUNDS_BLOCK))


def plan_bytes(mask: ColumnMask, head_dim: int, head_dim_v: int, dtype: torch.dtype) -> int:
    """Makes all that a training step needs to know of a mask, anew if the mask is new; its bytes beside the bounds."""
    bounds = padded_bounds(mask)
    size = 0 if bounds.data_ptr() == mask.bounds.data_ptr() else bounds.nbytes
    for kernel in ("forward", "dq", "dkdv"):
        config = configs.candidates(kernel, *_device(mask.device), head_dim, head_dim_v, dtype.itemsize)[0]
        size += tile_list(mask, config.block_m, config.block_n, by_columns=kernel == "dkdv").nbytes
    return size


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: ColumnMask, softmax_scale: float, softcap: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q ``[B, Sq, Hq, D]``, k ``[B, Sk, Hkv, D]``, v ``[B, Sk, Hkv, Dv]`` to out ``[B, Sq, Hq, Dv]`` and lse."""
    q, softmax_scale = positive_scale(q, softmax_scale)
    batch, q_len, heads_q, _ = q.shape
    out = q.new_empty(batch, q_len, heads_q, v.shape[3])
    lse = q.new_empty(batch, heads_q, q_len, dtype=torch.float32)
    case = _Case(q, k, v, mask, softmax_scale, softcap)
    case.launch(
        forward_kernel, "forward", {"q": q, "k": k, "v": v, "out": out},
        {"lse": lse, "sinks": sinks if sinks is not None else lse}, SINKS=sinks is not None,
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
    """Gradients of q, k, v and sinks, in their shapes and dtypes; the same bits run after run."""
    given_scale = softmax_scale
    q, softmax_scale = positive_scale(q, softmax_scale)
    do = do if do.stride(-1) == 1 else do.contiguous()
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    stats_len = triton.cdiv(q.shape[1], BOUNDS_BLOCK) * BOUNDS_BLOCK
    # Zeros: blocks of keys may be longer than those of queries, which write it, and read on.
    stats = lse.new_zeros(*lse.shape[:2], 2, stats_len)
    case = _Case(q, k, v, mask, softmax_scale, softcap)
    case.launch(
        dq_kernel, "dq", {"q": q, "k": k, "v": v, "out": out, "do": do, "dq": dq},
        {"lse": lse, "dlse": lse if dlse is None else dlse.contiguous(), "stats": stats}, DLSE=dlse is not None,
    )  # fmt: skip
    case.launch(dkdv_kernel, "dkdv", {"q": q, "k": k, "v": v, "do": do, "dk": dk, "dv": dv}, {"stats": stats})
    if given_scale <= 0:
        dq = dq * sign(given_scale)
    dsinks = None if sinks is None else sink_gradient(sinks, lse, stats[:, :, 1, : q.shape[1]])
    return dq, dk, dv, dsinks


class _Case:
    """One attention problem: what all its launches have in common."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, mask: ColumnMask, softmax_scale: float, softcap: float) -> None:
        self.batch, self.q_len, self.heads_q, self.head_dim = q.shape
        self.kv_len, self.heads_kv, self.head_dim_v = k.shape[1], k.shape[2], v.shape[3]
        self.device, self.dtype = q.device, q.dtype
        self.mask = mask
        self.bounds = padded_bounds(mask)
        self.softmax_scale = softmax_scale
        # Scores become powers of two, since exp2 is what the hardware has.
        self.qk_scale = (softcap or softmax_scale) * LOG2E
        self.cap_scale = softmax_scale / softcap if softcap else 0.0
        self.softcap = bool(softcap)

    def launch(
        self, kernel: Any, name: str, tiles: dict[str, Tensor], vectors: dict[str, Tensor], **flags: bool
    ) -> None:
        """Run a kernel with the first configuration that the device has room for.

        Args:
            tiles: its ``[B, S, H, D]`` tensors by parameter name.
            vectors: its other tensors.
        """
        tma = configs.uses_tma(_device(self.device)[0], self.dtype.itemsize) and all(
            describable(t) for t in tiles.values()
        )
        shape = (self.head_dim, self.head_dim_v, self.dtype, self.device)
        with_room(name, *shape, lambda config: self._launch(kernel, name, config, tma, tiles, vectors, flags))

    def _launch(
        self,
        kernel: Any,
        name: str,
        config: Config,
        tma: bool,
        tiles: dict[str, Tensor],
        vectors: dict[str, Tensor],
        flags: dict[str, bool],
    ) -> None:
        by_columns = name == "dkdv"
        lists = tile_list(self.mask, config.block_m, config.block_n, by_columns=by_columns)
        heads = self.heads_kv if by_columns else self.heads_q
        masks_b, masks_h = self.mask.shape[:2]
        arguments: dict[str, Any] = {}
        for tile, t in tiles.items():
            rows = config.block_m if tile in _QUERY_SIDE else config.block_n
            arguments[tile] = _descriptor(t, rows) if tma else t
            strides = [0, 0, 0] if tma else [t.stride(d) if t.shape[d] > 1 else 0 for d in (0, 2, 1)]
            short = _SHORT.get(tile, tile)
            arguments.update(zip((f"{short}_sb", f"{short}_sh", f"{short}_ss"), strides, strict=True))
        if name != "forward":
            arguments.update(softmax_scale=self.softmax_scale, stats_len=vectors["stats"].shape[3])
        bounds: Any = self.bounds
        tma_bounds = tma and not config.merge
        if tma_bounds:
            bounds = _row_descriptor(bounds, config.block_n)
        if tma and by_columns:
            vectors = {**vectors, "stats": _row_descriptor(vectors["stats"].flatten(0, 2), config.block_m)}
        registers = {} if by_columns else {"IN_REGISTERS": config.in_registers}
        with torch.cuda.device_of(self.bounds):  # Triton launches on the current device
            kernel[(self.batch * heads * lists.lines,)](
                **arguments, **vectors, bounds=bounds, bounds_len=self.bounds.shape[1],
                spans=lists.spans, counts=lists.counts, order=lists.order,
                q_len=self.q_len, kv_len=self.kv_len, lines=lists.lines, capacity=lists.capacity,
                heads_total=self.batch * heads, heads=heads, group=self.heads_q // self.heads_kv,
                mask_stride=masks_h if masks_b > 1 else 0, mask_heads=self.heads_q // masks_h,
                qk_scale=self.qk_scale, cap_scale=self.cap_scale,
                HEAD_DIM=self.head_dim, HEAD_DIM_V=self.head_dim_v,
                BLOCK_D=padded(self.head_dim), BLOCK_DV=padded(self.head_dim_v),
                BLOCK_M=config.block_m, BLOCK_N=config.block_n,
                CAUSAL=self.mask.causal, NUM_BOUNDS=self.mask.bounds.shape[2], SOFTCAP=self.softcap,
                TMA=tma, TMA_BOUNDS=tma_bounds, PRECISION=precision(self.dtype), HEAD_GROUP=config.head_group,
                STAGES=config.num_stages, MERGE=config.merge, **registers, **flags,
                num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
            )  # fmt: skip


def with_room(
    name: str, head_dim: int, head_dim_v: int, dtype: torch.dtype, device: torch.device, run: Callable[[Config], None]
) -> None:
    """Run a kernel with the first of its configurations that the device has room for."""
    choices = configs.candidates(name, *_device(device), head_dim, head_dim_v, dtype.itemsize)
    for i, config in enumerate(choices):
        try:
            run(config)
            return
        except OutOfResources as error:
            if i + 1 == len(choices):
                raise RuntimeError(
                    f"no configuration of the {name} kernel fits {device}: head dims {head_dim} and {head_dim_v} of "
                    f"{dtype} need {error.required} of {error.name}, the device has {error.limit}; use backend='torch'"
                ) from error


_QUERY_SIDE = {"q", "out", "do", "dq"}
_SHORT = {"out": "o"}


def precision(dtype: torch.dtype) -> str:
    """How float32 tiles are multiplied: tf32 only where the user allowed it for torch's own matmuls.

    Otherwise in three tf32 products, which give float32's accuracy on tensor cores.
    """
    if dtype != torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


@functools.cache
def _device(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and shared memory a block; a CPU is Triton's interpreter."""
    if device.type == "cpu":
        return (8, 0), 2**30
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return (0, 0), 65536
    return (properties.major, properties.minor), properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


def has_pdl(device: torch.device) -> bool:
    """Whether a kernel can be launched while the one before it still runs, and wait for it then."""
    return device.type == "cuda" and torch.version.hip is None and _device(device)[0] >= (9, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return 4 if device.type == "cpu" else int(torch.cuda.get_device_properties(device).multi_processor_count)


def _descriptor(t: Tensor, rows: int) -> TensorDescriptor:
    """``[B, H, S, D]`` view of t, in boxes of ``rows`` x D."""
    batch, length, heads, head_dim = t.shape
    shape = [batch, heads, length, head_dim]
    # A stride that is never taken still has to be valid.
    strides = [t.stride(d) if t.shape[d] > 1 else 16 for d in (0, 2, 1)]
    return TensorDescriptor(t, shape, [*strides, 1], [1, 1, rows, padded(head_dim)])


def _row_descriptor(t: Tensor, columns: int) -> TensorDescriptor:
    """A matrix, in pieces of one row."""
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [1, columns])
