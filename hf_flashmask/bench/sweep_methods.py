"""Attention implementations that ``flashmask bench sweep`` compares, each with its own form of one row's mask.

Masks are made anew in every step, inside what is timed: every batch of a training has another one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_flashmask import masks

from .sweep_tasks import TASKS, PackedRow

FLEX_BLOCK = 128


@dataclass(frozen=True)
class Method:
    """An attention implementation of Transformers and what its model is called with on a row."""

    implementation: str
    arguments: Callable[[PackedRow], dict[str, Any]]
    # Why it cannot serve a task on a device; None where it can.
    refusal: Callable[[str, str], str | None] = lambda task, device: None


def _dense(row: PackedRow) -> dict[str, Any]:
    """sdpa with a boolean mask ``[1, 1, S, S]``, as Transformers makes it of packed rows."""
    ends = _ends(row)
    rows = torch.arange(row.tokens, device=ends.device)
    return {"attention_mask": (rows[:, None] < ends).tril_()[None, None]}


def _ours(row: PackedRow) -> dict[str, Any]:
    return {"attention_mask": masks.share_question(row.lengths, device=row.input_ids.device)}


def _flex(row: PackedRow) -> dict[str, Any]:
    return {"attention_mask": block_mask(_ends(row))}


def _varlen(row: PackedRow) -> dict[str, Any]:
    return {"cu_seq_lens_q": row.cu_seqlens, "max_length_q": row.longest}


def _varlen_refusal(task: str, device: str) -> str | None:
    if TASKS[task].answers > 1:
        return "refused: it keeps documents apart, but answers that share a question are no documents"
    if torch.device(device).type != "cuda":
        return "refused: torch's varlen attention needs a CUDA device"
    return None


def _flex_refusal(task: str, device: str) -> str | None:
    return None if torch.device(device).type == "cuda" else "refused: FlexAttention has no backward on a CPU"


# Transformers takes every name with "flash" in it for FlashAttention.
FLEX, VARLEN = "bench_flex", "bench_varlen"
METHODS = {
    "sdpa": Method("sdpa", _dense),
    "flex_attention": Method(FLEX, _flex, _flex_refusal),
    "flash_varlen": Method(VARLEN, _varlen, _varlen_refusal),
    "flashmask": Method("flashmask", _ours),
}


def register() -> None:
    """Make the implementations of this file known to Transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(FLEX, _flex_attention)
    AttentionInterface.register(VARLEN, _varlen_attention)


def _ends(row: PackedRow) -> Tensor:
    """int32 ``[S]``: key j is seen by queries j up to this one, exclusive."""
    return masks.share_question(row.lengths, device=row.input_ids.device).bounds[0, 0, 0]


# ---- FlexAttention -----------------------------------------------------------------------------------------------


def block_mask(ends: Tensor, block: int = FLEX_BLOCK) -> Any:
    """FlexAttention's mask of causal columns that end: what its ``create_block_mask`` finds, from the bounds alone, so
    that no mask of S x S pairs is ever made.

    Args:
        ends: int ``[S]``, more than its index for every key.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i < ends[j])

    size = ends.numel()
    count = -(-size // block)
    padded = torch.nn.functional.pad(ends, (0, count * block - size))
    inside = torch.arange(count * block, device=ends.device) < size
    most = padded.view(count, block).amax(1)
    least = torch.where(inside, padded, 0).view(count, block).amin(1)  # 0: a block that hangs over is never full
    first = torch.arange(count, device=ends.device) * block
    below = first[:, None] > first  # [query blocks, key blocks], the diagonal left out
    seen = (below & (first[:, None] < most)) | torch.eye(count, dtype=torch.bool, device=ends.device)
    full = below & (first[:, None] + block <= least)
    (kv_num, kv_at), (full_num, full_at) = _ordered(seen & ~full), _ordered(full)
    return BlockMask.from_kv_blocks(
        kv_num, kv_at, full_num, full_at, BLOCK_SIZE=block, mask_mod=mask_mod, seq_lengths=(size, size)
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """int32 ``[1, 1, n]`` and ``[1, 1, n, n]``: how many key blocks each query block has, and which, these first."""
    order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None].contiguous()


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, scaling: float,
    dropout: float = 0.0, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    out = _compiled_flex()(query, key, value, block_mask=attention_mask, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


# ---- FlashAttention over documents -----------------------------------------------------------------------------


def _varlen_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, scaling: float,
    cu_seq_lens_q: Tensor, max_length_q: int, dropout: float = 0.0, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    from torch.nn.attention import varlen

    # torch 2.10 says causal by a flag and has one scale, 2.11 and later by a window.
    attend: Any = varlen.varlen_attn
    known = inspect.signature(attend).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "scale" in known:
        causal["scale"] = scaling
    elif scaling != query.shape[-1] ** -0.5:
        raise NotImplementedError(f"torch {torch.__version__} has varlen attention of one scale, got {scaling}")
    tokens = (t[0].transpose(0, 1) for t in (query, key, value))  # [S, H, D]
    out: Tensor = attend(*tokens, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **causal)
    return out[None], None
