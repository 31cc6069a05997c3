"""The paper's masks and ours, one function a mask, named as in the paper (arXiv 2410.01359, figure 1).

Documents of a packed row are given in whichever form is at hand: ``cu_seqlens`` (``[n + 1]``, 0 first), ``lengths``
(``[n]``, or one list a batch row), or ``position_ids`` (``[S]`` or ``[B, S]``, a new document wherever a position does
not follow the one before, as Transformers counts). Every builder is O(N) and vectorised over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .column_mask import ColumnMask
from .intervals import run_spans

Ints = Sequence[int] | Tensor
Device = torch.device | str | None


# ---- helpers ---------------------------------------------------------------------------------------------------


def _positive(name: str, value: int, least: int = 1) -> int:
    # A SymInt is what a length is while torch.export traces.
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")
    return value


def _vector(name: str, value: Any, device: Device, ndim: tuple[int, ...] = (1,)) -> Tensor:
    """Integers as an int64 tensor, on ``device`` or where they already are."""
    t = torch.as_tensor(value, device=device)
    if t.is_floating_point() or t.is_complex() or t.ndim not in ndim or t.numel() == 0:
        ranks = " or ".join(f"{n}-D" for n in ndim)
        raise ValueError(f"{name} must be a non-empty {ranks} integer tensor or list, got {t.dtype} {tuple(t.shape)}")
    return t.to(torch.int64)


def _flat(name: str, value: Any, device: Device, n_docs: int) -> Tensor:
    t = _vector(name, value, device)
    if t.numel() != n_docs:
        raise ValueError(f"{name} must have one entry a document: expected {n_docs}, got {t.numel()}")
    return t


def _lengths_of(cu_seqlens: Ints | None, lengths: Any, device: Device) -> Tensor:
    if (cu_seqlens is None) == (lengths is None):
        raise ValueError("give the documents once: exactly one of cu_seqlens and lengths")
    if cu_seqlens is not None:
        cu = _vector("cu_seqlens", cu_seqlens, device)
        lens = cu.diff()
        if cu.numel() < 2 or int(cu[0]) != 0 or bool((lens < 0).any()):
            raise ValueError(f"cu_seqlens must start with 0 and not decrease, got {cu.tolist()[:8]}")
    else:
        lens = _vector("lengths", lengths, device)
        if bool((lens < 0).any()):
            raise ValueError(f"lengths must not be negative, got {lens.tolist()[:8]}")
    if int(lens.sum()) == 0:
        raise ValueError("the documents hold no token")
    return lens


def _spans(lens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Document number, first and end token of every token: int64 ``[S]`` each."""
    end = lens.cumsum(0)
    doc = torch.repeat_interleave(torch.arange(lens.numel(), device=lens.device), lens)
    return doc, (end - lens)[doc], end[doc]


def _documents(
    cu_seqlens: Ints | None, lengths: Any, position_ids: Tensor | None, device: Device
) -> tuple[Tensor, Tensor]:
    """First and end token of every token's document: int64 ``[B, S]`` each."""
    if position_ids is not None:
        if cu_seqlens is not None or lengths is not None:
            raise ValueError("give the documents once: one of cu_seqlens, lengths and position_ids")
        pos = torch.atleast_2d(_vector("position_ids", position_ids, device, (1, 2)))
        new = torch.ones_like(pos, dtype=torch.bool)
        new[:, 1:] = pos.diff() != 1
        return run_spans(new)
    if lengths is not None and not isinstance(lengths, Tensor) and len(lengths) and _is_row(lengths[0]):
        rows = [_spans(_lengths_of(cu_seqlens, row, device))[1:] for row in lengths]
        totals = {start.numel() for start, _ in rows}
        if len(totals) > 1:
            raise ValueError(f"every batch row of lengths must hold as many tokens, got rows of {sorted(totals)}")
        start, end = (torch.stack(t) for t in zip(*rows, strict=True))
        return start, end
    _, start, end = _spans(_lengths_of(cu_seqlens, lengths, device))
    return start[None], end[None]


def _pair(window_size: Sequence[int]) -> Sequence[int]:
    if len(window_size) != 2:
        raise ValueError(f"window_size must be an int or a pair (left, right), got {window_size!r}")
    return window_size


def _is_row(value: Any) -> bool:
    return isinstance(value, Sequence) or (isinstance(value, Tensor) and value.ndim > 0)


def _mask(causal: bool, *vectors: Tensor, q_len: int | None = None) -> ColumnMask:
    """Bound vectors ``[S]`` or ``[B, S]`` or ``[B, Hm, S]`` to a mask."""
    rank = max(v.ndim for v in vectors)
    bounds = torch.stack(torch.broadcast_tensors(*vectors), -2).to(torch.int32)
    bounds = bounds[None, None] if rank == 1 else bounds[:, None] if rank == 2 else bounds
    return ColumnMask(bounds.contiguous(), causal=causal, q_len=q_len)


def _end_of_deeper(depth: Tensor) -> Tensor:
    """For every token of one row, the first later token whose depth is not greater, or the row's end: int64 ``[S]``.

    Depth rises by one inside a branch, so a branch's least depth is its first: searching branches is enough.
    """
    n = depth.numel()
    new = torch.nn.functional.pad(depth, (1, 0), value=-2).diff() != 1
    first = new.nonzero()[:, 0]
    end = new.cumsum(0)  # the next branch, to be moved past deeper ones
    # smallest[k][r]: least depth of branches [r, r + 2^k); walking k down skips the longest deeper stretch.
    smallest = [depth[first]]
    while 1 << len(smallest) <= first.numel():
        half = 1 << (len(smallest) - 1)
        smallest.append(torch.minimum(smallest[-1][:-half], smallest[-1][half:]))
    for k in range(len(smallest) - 1, -1, -1):
        room = first.numel() - (1 << k)
        deeper = smallest[k][end.clamp(max=room)] > depth
        end += (deeper & (end <= room)).to(torch.int64) << k
    return torch.nn.functional.pad(first, (0, 1), value=n)[end]


# ---- the paper's masks -----------------------------------------------------------------------------------------


def full(seq_len: int, *, q_len: int | None = None, device: Device = None) -> ColumnMask:
    """Everything is visible."""
    n, q_len = _positive("seq_len", seq_len), _positive("q_len", seq_len if q_len is None else q_len)
    zero = torch.zeros(n, dtype=torch.int64, device=device)
    mask = _mask(False, zero + q_len, zero, q_len=q_len)
    mask.full_prefix = n
    return mask


def causal(seq_len: int, *, q_len: int | None = None, device: Device = None) -> ColumnMask:
    """``j <= i + (Sk - Sq)``."""
    n, q_len = _positive("seq_len", seq_len), _positive("q_len", seq_len if q_len is None else q_len)
    mask = _mask(True, torch.full((n,), q_len, device=device), q_len=q_len)
    mask.full_prefix = max(0, n - q_len + 1)
    return mask


def sliding_window(
    seq_len: int, window_size: int | tuple[int, int], *, q_len: int | None = None, device: Device = None
) -> ColumnMask:
    """A window that moves with the query, aligned to the bottom right corner when Sq != Sk.

    Args:
        window_size: an int w as in Transformers: causal, the w latest keys, the query's own included. Or a pair
            ``(left, right)`` as in FlashAttention: keys ``[i - left, i + right]``, -1 for no limit.
    """
    n, q_len = _positive("seq_len", seq_len), _positive("q_len", seq_len if q_len is None else q_len)
    at = torch.arange(n, device=device) - (n - q_len)
    if isinstance(window_size, (tuple, list)):
        left, right = (_positive("window_size", w, -1) for w in _pair(window_size))
    else:
        left, right = _positive("window_size", window_size) - 1, 0
    lts = (at + left + 1).clamp(0, q_len) if left >= 0 else torch.full_like(at, q_len)
    if right == 0:
        return _mask(True, lts, q_len=q_len)
    return _mask(False, lts, (at - right).clamp(0, q_len) if right > 0 else torch.zeros_like(at), q_len=q_len)


def causal_document(
    cu_seqlens: Ints | None = None, *, lengths: Any = None, position_ids: Tensor | None = None, device: Device = None
) -> ColumnMask:
    """Packed documents, each causal: what packed SFT needs."""
    _, end = _documents(cu_seqlens, lengths, position_ids, device)
    return _mask(True, end)


def document(
    cu_seqlens: Ints | None = None, *, lengths: Any = None, position_ids: Tensor | None = None, device: Device = None
) -> ColumnMask:
    """Packed documents, each bidirectional."""
    start, end = _documents(cu_seqlens, lengths, position_ids, device)
    return _mask(False, end, start)


def share_question(lengths: Sequence[Sequence[int]], *, device: Device = None) -> ColumnMask:
    """Packed groups of one question and its answers (DPO, reward): an answer sees its question and itself.

    Args:
        lengths: one ``[question, answer, answer, ...]`` a group.
    """
    if not len(lengths) or not all(_is_row(group) and len(group) for group in lengths):
        raise ValueError(f"lengths must hold one [question, answer, ...] a group, got {lengths!r}")
    lengths = [torch.as_tensor(group).tolist() for group in lengths]
    part = _lengths_of(None, [n for group in lengths for n in group], device)
    _, _, end = _spans(part)
    group = torch.tensor([sum(g) for g in lengths], device=part.device)
    _, _, group_end = _spans(group)
    is_question = torch.tensor([k == 0 for g in lengths for k in range(len(g))], device=part.device)
    return _mask(True, torch.where(torch.repeat_interleave(is_question, part), group_end, end))


def global_sliding_window(
    seq_len: int, num_global: int, window_size: int | tuple[int, int], *, device: Device = None
) -> ColumnMask:
    """The first ``num_global`` tokens see and are seen by all; others see keys ``[i - left, i + right]``.

    ``window_size`` as an int stands for ``(w, w)``.
    """
    n, g = _positive("seq_len", seq_len), _positive("num_global", num_global, 0)
    left, right = _pair(window_size) if isinstance(window_size, (tuple, list)) else (window_size, window_size)
    _positive("window_size", left, 0), _positive("window_size", right, 0)
    j = torch.arange(n, device=device)
    everywhere = j < g
    ute = (j - right).clamp(min=0)
    gap = ~everywhere & (ute > g)
    return _mask(
        False,
        torch.where(everywhere, n, (j + left + 1).clamp(max=n).clamp(min=min(g, n))),
        torch.full_like(j, n),
        torch.where(gap, g, 0),
        torch.where(gap, ute, 0),
    )


def causal_blockwise(
    cu_seqlens: Ints | None = None, *, lengths: Ints | None = None, device: Device = None
) -> ColumnMask:
    """In-context learning: causal demonstrations that do not see each other; the last document sees them all."""
    lens = _lengths_of(cu_seqlens, lengths, device)
    lens = lens[lens > 0]
    doc, _, end = _spans(lens)
    n, test = int(lens.sum()), doc == lens.numel() - 1
    return _mask(True, torch.where(test, n, end), torch.where(test, n, n - lens[-1]))


def prefix_lm_causal(seq_len: int, prefix_len: int, *, device: Device = None) -> ColumnMask:
    """Causal, and the first ``prefix_len`` keys are visible to all."""
    n, prefix = _positive("seq_len", seq_len), _positive("prefix_len", prefix_len, 0)
    j = torch.arange(n, device=device)
    return _mask(False, torch.full_like(j, n), torch.where(j < prefix, 0, j))


def prefix_lm_document(
    cu_seqlens: Ints | None = None, *, lengths: Ints | None = None, prefix_lengths: Ints, device: Device = None
) -> ColumnMask:
    """Packed documents, each causal but for its prefix, which its whole document sees."""
    lens = _lengths_of(cu_seqlens, lengths, device)
    prefix = _flat("prefix_lengths", prefix_lengths, lens.device, lens.numel())
    if bool((prefix < 0).any()):
        raise ValueError(f"prefix_lengths must not be negative, got {prefix.tolist()[:8]}")
    doc, start, end = _spans(lens)
    j = torch.arange(doc.numel(), device=lens.device)
    return _mask(False, end, torch.where(j - start < prefix[doc], start, j))


def qk_sparse(
    cu_seqlens: Ints | None = None,
    *,
    lengths: Ints | None = None,
    dropped: Sequence[bool] | Tensor,
    device: Device = None,
) -> ColumnMask:
    """Causal, and the keys of dropped segments are hidden until their segment ends.

    Args:
        dropped: one flag a segment.
    """
    lens = _lengths_of(cu_seqlens, lengths, device)
    flags = _flat("dropped", dropped, lens.device, lens.numel()).bool()
    doc, _, end = _spans(lens)
    j = torch.arange(doc.numel(), device=lens.device)
    n, gone = doc.numel(), flags[doc]
    return _mask(True, torch.where(gone, j, n), torch.where(gone, end, n))


def hash_sparse(q_buckets: Tensor, k_buckets: Tensor) -> ColumnMask:
    """LSH attention over queries and keys sorted by bucket: same bucket, and causal in the original order.

    Args:
        q_buckets: int ``[S]`` or ``[B, Hm, S]``, the bucket of every query in its original place. The mask is for
            queries and keys taken in the order ``buckets.argsort(dim=-1, stable=True)``.
        k_buckets: the same of the keys.
    """
    q, k = (_vector(n, t, None, (1, 3)) for n, t in (("q_buckets", q_buckets), ("k_buckets", k_buckets)))
    if q.shape[:-1] != k.shape[:-1] or q.device != k.device:
        raise ValueError(f"q_buckets and k_buckets must agree but in length: got {tuple(q.shape)} and {tuple(k.shape)}")
    # Ranks in place of buckets, which may be any 64 bits.
    _, ranks = torch.unique(torch.cat((q, k), -1), return_inverse=True)
    q, k = ranks.split((q.shape[-1], k.shape[-1]), -1)
    width = max(q.shape[-1], k.shape[-1]) + 1
    (q, q_at), (k, k_at) = q.sort(dim=-1, stable=True), k.sort(dim=-1, stable=True)
    # Sorted queries ascend in (bucket, original position), so one search finds a bucket's end and a key's first row.
    rows = q * width + q_at
    lts = torch.searchsorted(rows, (k + 1) * width)
    ute = torch.searchsorted(rows, k * width + k_at)
    return _mask(False, lts, ute, q_len=q.shape[-1])


def random_eviction(
    seq_len: int,
    *,
    start: int | None = None,
    batch_size: int = 1,
    num_heads: int = 1,
    generator: torch.Generator | None = None,
    device: Device = None,
) -> ColumnMask:
    """KV-cache eviction: from row ``start`` (default half way) on, every row evicts one random earlier key."""
    n = _positive("seq_len", seq_len)
    start = _positive("start", n // 2 if start is None else start, 0)
    groups = _positive("batch_size", batch_size) * _positive("num_heads", num_heads)
    j = torch.arange(n)
    order = torch.rand(groups, n, generator=generator).argsort(-1)
    # Rank r < n - start is evicted by row start + r, but never before the row after its own.
    row = torch.where(order < n - start, start + order, n)
    row = torch.where(row < n, torch.maximum(row, j + 1), row)
    return _mask(True, row.view(batch_size, num_heads, n).to(device or "cpu"))


# ---- ours ------------------------------------------------------------------------------------------------------


def prefix_tree(position_ids: Tensor) -> ColumnMask:
    """Rows as prefix tries in depth-first order, ``position_ids`` the depth: a token sees its ancestors and itself.

    Covers packing, shared prompts, groups and nested turns with one bound: column j is visible to rows
    ``[j, e_j)``, e_j the first later token whose depth is not greater.

    Args:
        position_ids: int ``[S]`` or ``[B, S]``; a root has depth 0, a child one more than its parent.
    """
    pos = torch.atleast_2d(_vector("position_ids", position_ids, None, (1, 2)))
    jump = torch.nn.functional.pad(pos, (1, 0), value=-1).diff()
    if bool((jump > 1).any()) or bool((pos < 0).any()):
        bad = ((jump > 1) | (pos < 0)).nonzero()[0].tolist()
        raise ValueError(
            "position_ids must be depths in depth-first order: roots at 0, every other token at most one deeper than "
            f"the token before it, but position_ids[{bad[0]}, {bad[1]}] is {int(pos[bad[0], bad[1]])}"
        )
    return _mask(True, torch.stack([_end_of_deeper(row) for row in pos]))


def image_blocks(block_ids: Tensor, *, window_size: int | None = None) -> ColumnMask:
    """(causal or same image) and, if given, the window ``i - j < window_size``: Gemma 3 and 4, PaliGemma.

    Args:
        block_ids: int ``[S]`` or ``[B, S]``: the image that a token belongs to, -1 for text. An image's tokens are
            consecutive.
    """
    ids = torch.atleast_2d(_vector("block_ids", block_ids, None, (1, 2)))
    j = torch.arange(ids.shape[1], device=ids.device)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids.diff() != 0
    first, _ = run_spans(new)
    image = ids >= 0
    ordered, _ = torch.where(new & image, ids, -1 - j).sort(-1)
    if bool((ordered.diff() == 0).any()):
        raise ValueError("block_ids: the tokens of one image must be consecutive; give every run a number of its own")
    ute = torch.where(image, first, j)
    lts = torch.full_like(ids, ids.shape[1])
    if window_size is not None:
        # The window bounds how far back a row looks; keys ahead, in the same image, are always inside it.
        lts = (j + _positive("window_size", window_size)).clamp(max=ids.shape[1]).expand_as(ids)
    return _mask(False, lts, ute)


def padding(attention_mask: Tensor, *, causal: bool = True) -> ColumnMask:
    """Keys that are padding are hidden from all rows, wherever they are: left, right or between.

    Args:
        attention_mask: bool or 0/1 int ``[B, S]``, nonzero = a real token.
        causal: also hide later keys.
    """
    keep = torch.as_tensor(attention_mask)
    if keep.ndim != 2 or keep.is_floating_point() or keep.numel() == 0:
        raise ValueError(f"attention_mask must be bool or int [B, S], got {keep.dtype} {tuple(keep.shape)}")
    lts = torch.where(keep.bool(), keep.shape[1], 0)
    return _mask(True, lts) if causal else _mask(False, lts, torch.zeros_like(lts))
