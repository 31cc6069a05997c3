"""Packed rows: documents recovered wherever Transformers drops them.

Transformers separates packed documents only when position_ids reach its mask creation and there is neither an
attention_mask nor a cache. ``use_cache=True``, a mask of ones, or a model that does not pass position_ids on (gpt-oss,
OPT) lets documents see each other. Here they are read from what the attention function receives (``cu_seq_lens_q``,
``position_ids``), and from what mask creation was given.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hf_flashmask.masks import ColumnMask
from hf_flashmask.masks.column_mask import version_of
from hf_flashmask.masks.intervals import run_spans


class Documents(NamedTuple):
    """Rows ``[start, end)`` of the document that each key is in: int64 ``[B|1, S]``."""

    start: Tensor
    end: Tensor

    def mask(self, q_len: int | None = None) -> ColumnMask:
        ends = self.end.clamp(max=self.end.shape[1])
        bounds = torch.stack((ends, self.start), 1).unsqueeze(1).to(torch.int32)
        return ColumnMask(bounds, causal=False, q_len=q_len)

    def restrict(self, mask: ColumnMask) -> ColumnMask:
        """The mask, seen only inside documents."""
        start, end = (t.to(mask.device, torch.int32).unsqueeze(1) for t in self)
        lts, *rest = mask.bounds.unbind(2)
        # Visible rows are one interval, [UTE, LTS) or [diagonal, LTS): cut it, on the device, without reading it.
        if mask.causal and not rest:
            return ColumnMask(torch.minimum(lts, end).unsqueeze(2), causal=True, q_len=mask.q_len)
        if not mask.causal and len(rest) == 1:
            vectors = torch.broadcast_tensors(torch.minimum(lts, end), torch.maximum(rest[0], start))
            return ColumnMask(torch.stack(vectors, 2), causal=False, q_len=mask.q_len)
        return mask & self.mask()


def check_size(mask: ColumnMask, q_len: int, kv_len: int) -> None:
    """
    Raises:
        ValueError: a mask that a user gave is not for this forward.
    """
    if (mask.q_len, mask.kv_len) != (q_len, kv_len):
        raise ValueError(
            f"the ColumnMask given as attention_mask is for {mask.q_len} queries x {mask.kv_len} keys, but this "
            f"forward has {q_len} x {kv_len}"
        )


class BuiltMask(ColumnMask):
    """A mask that was built from Transformers' mask functions: the row's documents may still have to be told apart.

    Masks that a user gives are final; position_ids never change them (a prefix tree repeats positions on purpose).
    """

    __slots__ = ("documents_known",)

    def __init__(
        self, bounds: Tensor, *, causal: bool, q_len: int | None = None, documents_known: bool = False
    ) -> None:
        super().__init__(bounds, causal=causal, q_len=q_len)
        self.documents_known = documents_known

    @classmethod
    def of(cls, mask: ColumnMask, documents_known: bool) -> BuiltMask:
        return cls(mask.bounds, causal=mask.causal, q_len=mask.q_len, documents_known=documents_known)

    def _moved(self, bounds: Tensor) -> BuiltMask:
        return BuiltMask(bounds, causal=self.causal, q_len=self.q_len, documents_known=self.documents_known)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.bounds, self.causal, self.q_len, self.documents_known)


def _rebuild(bounds: Tensor, causal: bool, q_len: int, documents_known: bool) -> BuiltMask:
    return BuiltMask(bounds, causal=causal, q_len=q_len, documents_known=documents_known)


def documents_from_position_ids(position_ids: Tensor, seq_len: int, kept: Tensor | None) -> Documents | None:
    """A document begins wherever a row is at its lowest position, and wherever positions fall.

    The lowest is 0, except where a model counts from another number (RoBERTa's from 2). Transformers' FlashAttention
    path goes by zeros alone, its masks by whatever does not follow; positions may be skipped or repeated here.

    Args:
        kept: bool ``[B|1, S]``, False for padding, whose positions mean nothing: ``generate`` fills them with 0 or 1,
            also between a soft prompt and the left-padded text behind it.

    Returns:
        None for positions that say nothing of the row: multi-axis (mRoPE) ones and those of another length.
    """
    if position_ids.ndim != 2 or position_ids.shape[1] != seq_len or position_ids.is_floating_point():
        return None
    if kept is None:
        new = position_ids == position_ids.amin(1, keepdim=True)
        new[:, 1:] |= position_ids.diff() < 0
        return Documents(*run_spans(new))
    position_ids, kept = torch.broadcast_tensors(position_ids, kept.to(position_ids.device))
    padding = torch.iinfo(position_ids.dtype).max
    lowest = torch.where(kept, position_ids, padding).amin(1, keepdim=True)
    # The last token before each that is none of padding; those before the first such stand before themselves.
    at = torch.arange(seq_len, device=position_ids.device)
    before = torch.where(kept, at, -1).cummax(1).values.roll(1, 1)
    before = torch.where((before < 0) | (at == 0), at, before)
    falls = position_ids < position_ids.gather(1, before)
    return Documents(*run_spans(((position_ids == lowest) | falls) & kept))


def documents_from_seq_idx(seq_idx: Tensor) -> Documents:
    """``[B, S]`` with the number of every token's document, as recurrent layers are told of them."""
    new = torch.ones_like(seq_idx, dtype=torch.bool)
    new[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return Documents(*run_spans(new))


def documents_from_cu_seqlens(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, q_len: int, kv_len: int) -> Documents:
    """Keys of the k-th sequence belong to the queries of the k-th; tokens after the last form one more."""
    device = cu_seqlens_q.device
    ends_q = torch.cat((cu_seqlens_q.to(torch.int64), torch.tensor([q_len], device=device)))
    at = torch.searchsorted(cu_seqlens_k[1:].to(torch.int64), torch.arange(kv_len, device=device), right=True)
    return Documents(ends_q[at][None], ends_q[at + 1][None])


_ends: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def covers(cu_seqlens_q: Any, cu_seqlens_k: Any, q_len: int, kv_len: int) -> bool:
    """Whether ``cu_seqlens`` end where queries and keys do. Read once a tensor: layers share it, and a device waits.

    While torch.compile traces or a CUDA graph is captured they cannot be read, and are checked on the device.
    """
    for cu_seqlens, length in ((cu_seqlens_q, q_len), (cu_seqlens_k, kv_len)):
        if not isinstance(cu_seqlens, Tensor):
            continue
        if torch.compiler.is_compiling() or (cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):
            fits = cu_seqlens[-1] == length
            torch._assert_async(fits, "flashmask, compiled or captured: cu_seq_lens of another length than the row")
            continue
        version = version_of(cu_seqlens)
        if cu_seqlens not in _ends or _ends[cu_seqlens][0] != version:
            _ends[cu_seqlens] = (version, int(cu_seqlens[-1]))
        if _ends[cu_seqlens][1] != length:
            return False
    return True


def split_documents(
    mask: ColumnMask,
    position_ids: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seq_idx: Tensor | None = None,
) -> ColumnMask:
    """The mask cut to the documents that the attention kwargs tell of; once a forward, whatever the number of layers.

    ``cu_seqlens`` always hold, ``seq_idx`` for masks of Transformers', and ``position_ids`` for those among them that
    do not know their documents yet.
    """
    if cu_seqlens_q is not None:
        given = (cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k)
        return _once(mask, given, lambda: documents_from_cu_seqlens(*given, mask.q_len, mask.kv_len))
    if not isinstance(mask, BuiltMask) or mask.q_len != mask.kv_len:
        return mask
    if seq_idx is not None and seq_idx.ndim == 2 and seq_idx.shape[1] == mask.q_len:
        return _once(mask, (seq_idx,), lambda: documents_from_seq_idx(seq_idx))
    if position_ids is not None and not mask.documents_known:
        return _once(mask, (position_ids,), lambda: documents_from_position_ids(position_ids, mask.q_len, _seen(mask)))
    return mask


def _seen(mask: ColumnMask) -> Tensor:
    """bool ``[B|1, S]``: the keys that any query sees, i.e. all but padding."""
    return (mask.visible_rows() > 0).any(1)


def _once(mask: ColumnMask, given: tuple[Tensor, ...], documents: Callable[[], Documents | None]) -> ColumnMask:
    """``documents()`` applied to the mask, remembered with it: the layers of a forward share both."""
    tracing = torch.compiler.is_compiling()
    if not tracing and not isinstance(mask, BuiltMask) and any(t.is_inference() for t in given):
        return _restricted(mask, documents)  # a user's mask may come again, and these tensors changed without a trace
    versions = tuple(version_of(t) for t in (mask.bounds, *given))
    # Holding the tensors keeps their ids from being reused.
    known = mask._cache.get("documents", ((), None, mask))
    same = len(known[0]) == len(given) and all(a is b for a, b in zip(known[0], given, strict=True))
    if not same or known[1] != versions:
        with contextlib.nullcontext() if tracing else torch.inference_mode(False):
            known = (given, versions, _restricted(mask, documents))
        mask._cache["documents"] = known
    result: ColumnMask = known[2]
    return result


def _restricted(mask: ColumnMask, documents: Callable[[], Documents | None]) -> ColumnMask:
    found = documents()
    return mask if found is None else found.restrict(mask)


# ---- position_ids that mask creation was given but does not hand on ---------------------------------------------

_local = threading.local()


def take_position_ids() -> Tensor | None:
    """The position_ids of the mask creation under way; they are taken, so a later call never sees them."""
    position_ids: Tensor | None = getattr(_local, "position_ids", None)
    _local.position_ids = None
    return position_ids


def install(mask_function: Any) -> None:
    """Let ``transformers.masking_utils._preprocess_mask_arguments`` note its position_ids for our mask. Idempotent.

    Noted for every name that ``mask_function`` is registered under.

    Read in 5.17, 5.23 and 5.24, where it drops them beside a cache or a mask. Can go when mask interfaces receive them.
    """
    from transformers import AttentionMaskInterface, masking_utils

    from .paged import PagedStep
    from .sequence_parallel import refuse_lost_mask
    from .tree_mask import TreeMask

    stock = masking_utils._preprocess_mask_arguments
    if hasattr(stock, "_hf_flashmask"):
        return
    found = list(inspect.signature(stock).parameters)[:5]
    # The fourth was renamed in 5.24; it is handed on as it comes.
    if found[:3] + found[4:] != ["config", "inputs_embeds", "attention_mask", "position_ids"]:
        raise ImportError(
            "this release of transformers has another masking_utils._preprocess_mask_arguments than hf_flashmask "
            "knows; install transformers==5.24.0 or a newer hf-flashmask"
        )

    @functools.wraps(stock)
    def _preprocess_mask_arguments(
        config: Any, inputs_embeds: Any, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        ours = AttentionMaskInterface._global_mapping.get(config._attn_implementation) is mask_function
        if ours:
            # A 4D tensor is returned as it is, so the mask interface never sees it.
            refuse_lost_mask(attention_mask)
            _local.position_ids = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        found: Any = stock(config, inputs_embeds, attention_mask, *args, **kwargs)
        if isinstance(attention_mask, PagedStep) and found[1] is None:
            # 5.24 takes it that continuous batching needs no mask; the step travels as one.
            return (True, attention_mask, *found[2:])
        if ours and isinstance(attention_mask, ColumnMask) and not isinstance(attention_mask, TreeMask):
            # As for a 4D tensor, which is final: Llama 4 would go on to count the zeros of a 2-D one.
            check_size(attention_mask, found[3], found[4])
            take_position_ids()
            return (True, attention_mask.to(inputs_embeds.device), *found[2:])
        return found

    _preprocess_mask_arguments._hf_flashmask = True  # type: ignore[attr-defined]
    masking_utils._preprocess_mask_arguments = _preprocess_mask_arguments  # type: ignore[assignment]
