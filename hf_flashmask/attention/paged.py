"""Attention to keys that lie in pages: the decode kernels follow block tables, other backends gather the pages."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_flashmask.masks import ColumnMask

from .api import flashmask_attention
from .backends import choose

# Keys of a page, or a divisor of them, that the kernels' blocks fit into.
PAGE = 128


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    block_table: Tensor,
    mask: ColumnMask,
    *,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Exact attention of few queries to keys in pages; not differentiable.

    Args:
        q: ``[B, Sq, Hq, D]``, Sq at most 16.
        k_pages, v_pages: ``[P, page, Hkv, D]`` and ``[P, page, Hkv, Dv]``, of any strides but the last, which is 1.
        block_table: int32 ``[B, W]``, the pages of each batch row in order; anything where the mask hides the page.
        mask: B x Sq x (W * page).
        softmax_scale, softcap, sinks, backend: as in ``flashmask_attention``.

    Returns:
        ``[B, Sq, Hq, Dv]``.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument is not as described; nothing is computed.
    """
    page, width = k_pages.shape[1], block_table.shape[1]
    if block_table.dtype != torch.int32 or block_table.shape[0] != q.shape[0] or block_table.stride(1) != 1:
        raise ValueError(
            f"block_table must be int32 [{q.shape[0]}, W] with consecutive entries, got {block_table.dtype} "
            f"{tuple(block_table.shape)}, strides {block_table.stride()}"
        )
    if mask.shape != (q.shape[0], 1, q.shape[1], width * page):
        raise ValueError(
            f"the mask must be {(q.shape[0], 1, q.shape[1], width * page)}, as queries and pages, got {mask.shape}"
        )
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k_pages, v_pages)):
        raise NotImplementedError("keys in pages have no gradient; call it under torch.no_grad()")
    if page % PAGE == 0 and choose(backend, q, k_pages, v_pages) in ("triton", "hopper"):
        from .triton import decode_launch

        if q.shape[1] > decode_launch.MAX_Q_LEN:
            raise NotImplementedError(f"keys in pages serve up to {decode_launch.MAX_Q_LEN} queries, got {q.shape[1]}")
        scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
        return decode_launch.forward(q, k_pages, v_pages, mask, scale, softcap or 0.0, sinks, block_table)[0]
    k, v = (pages[block_table.clamp(min=0)].flatten(1, 2) for pages in (k_pages, v_pages))
    return flashmask_attention(
        q, k, v, mask, softmax_scale=softmax_scale, softcap=softcap, sinks=sinks, backend=backend
    )
