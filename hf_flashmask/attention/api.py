"""flashmask_attention: every argument is checked once, here; backends trust what they get."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from hf_flashmask.masks import ColumnMask
from hf_flashmask.masks import causal as causal_mask
from hf_flashmask.masks import full as full_mask

from . import op, reference
from .backends import BACKENDS

MAX_HEAD_DIM = 512  # Gemma 4 has global layers of 512
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@overload
def flashmask_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: ColumnMask | None = ..., *, startend_row_indices: Tensor | None = ...,
    causal: bool = ..., softmax_scale: float | None = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    return_lse: Literal[False] = ..., deterministic: bool = ..., sort_keys: bool = ..., backend: str = ...,
) -> Tensor: ...  # fmt: skip


@overload
def flashmask_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: ColumnMask | None = ..., *, startend_row_indices: Tensor | None = ...,
    causal: bool = ..., softmax_scale: float | None = ..., softcap: float | None = ..., sinks: Tensor | None = ...,
    return_lse: Literal[True], deterministic: bool = ..., sort_keys: bool = ..., backend: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def flashmask_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: ColumnMask | None = None,
    *,
    startend_row_indices: Tensor | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    sort_keys: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention under a column mask, skipping what it hides. Differentiable in q, k, v and sinks.

    Args:
        q: ``[B, Sq, Hq, D]``; float16, bfloat16, float32 or float64; D up to 512.
        k: ``[B, Sk, Hkv, D]``, Hkv a divisor of Hq (grouped or multi-query attention).
        v: ``[B, Sk, Hkv, Dv]``, Dv up to 512 and not necessarily D.
        mask: which pairs are visible; batch 1 or B, heads 1, Hkv or Hq. None with no ``startend_row_indices`` means
            all of them, or the causal triangle with ``causal=True``.
        startend_row_indices: int32 ``[B|1, Hm|1, Sk, C]`` as in Paddle, instead of ``mask``. What is planned for a
            mask is remembered with it: layers that share one ``ColumnMask`` plan once, these indices every call.
        causal: goes with ``startend_row_indices``, or with no mask at all; a ``ColumnMask`` knows its own.
        softmax_scale: default ``D ** -0.5``.
        softcap: scores become ``softcap * tanh(scores / softcap)``, as in Gemma 2.
        sinks: ``[Hq]``, one more logit a head that takes weight and gives no value, as in gpt-oss.
        return_lse: also return ``lse``, float32 ``[B, Hq, Sq]`` (float64 for float64), the log of the softmax
            denominator, sinks included; differentiable.
        backend: "auto", "hopper" (compute capability 9.0; 16-bit, head dims up to 256), "triton" (GPUs; 16-bit or
            float32, head dims up to 256; up to 16 queries, as in generation, by kernels that split the keys), "torch"
            (any device) or "reference" (dense, for tests). An explicit choice is never replaced by another; "auto"
            takes the one measured to be the fastest that serves, for each pass.
        deterministic: the same bits run after run. Only the backward of "hopper" is not like that by itself: it adds up
            the gradient of q in any order. The Triton kernels then serve in its place, as they do after
            ``torch.use_deterministic_algorithms(True)``.
        sort_keys: move keys and values, within windows of at most 1024, into the order in which the mask hides them
            (``ColumnMask.sort_columns``). The result is the same up to rounding. It pays where neighbouring keys are
            hidden from very different rows on, as by ``masks.random_eviction``, and costs a copy of k and v in each
            pass. The order is found once a mask. ("reference" has no tiles, and leaves them where they are.)

    Returns:
        ``out [B, Sq, Hq, Dv]``, or ``(out, lse)``. A query that sees no key has output 0, lse -inf (the sink's logit
        where there is one) and gradient 0.

    Raises:
        TypeError, ValueError, NotImplementedError: an argument is not as described; nothing is computed. So inside
            ``torch.func.grad`` and forward-mode differentiation, which only "reference" has.
    """
    signature = None
    as_usual = startend_row_indices is None and sort_keys is False
    if isinstance(mask, ColumnMask) and as_usual and op.nothing_watches(q, k, v, sinks):
        asked = (causal, softmax_scale, softcap, return_lse, deterministic, backend)
        signature = ("tokens", mask.version, *_signature(q, k, v, sinks), *asked)
        if (out := _like_the_last(mask, signature, q, k, v, sinks)) is not None:
            return out
    return _attend(
        q, k, v, mask, startend_row_indices, causal, softmax_scale, softcap, sinks, return_lse, deterministic,
        sort_keys, backend, signature,
    )  # fmt: skip


def attention_of_heads(
    q: Tensor, k: Tensor, v: Tensor, mask: ColumnMask, softmax_scale: float | None, softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """``flashmask_attention`` of tensors ``[B, H, S, D]``, as models hold them, to out ``[B, Sq, Hq, Dv]``.

    In eager generation the host is what takes the time, so views are made only where checks and plans are.
    """
    signature = None
    if op.nothing_watches(q, k, v, sinks):
        signature = ("heads", mask.version, *_signature(q, k, v, sinks), softmax_scale, softcap)
        if (out := _like_the_last(mask, signature, q, k, v, sinks)) is not None:
            return out
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    result: Tensor = _attend(
        q, k, v, mask, None, False, softmax_scale, softcap, sinks, False, False, False, "auto", signature
    )  # fmt: skip
    return result


def _signature(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[object, ...]:
    """All that checks and plans find in tensors but their addresses."""
    return (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype, q.device, k.device,
        v.device, None if sinks is None else (sinks.shape, sinks.stride(), sinks.dtype, sinks.device),
    )  # fmt: skip


def _like_the_last(
    mask: ColumnMask, signature: tuple[object, ...], q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
) -> Tensor | None:
    """out of a call like the last one under this mask, which was found good: the layers of a step of generation."""
    known = mask._cache.get("repeat")
    if known is None or known[0] != signature:
        return None
    out: Tensor | None = known[1](q, k, v, sinks)
    return out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: ColumnMask | None,
    startend_row_indices: Tensor | None,
    causal: bool,
    softmax_scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    return_lse: bool,
    deterministic: bool,
    sort_keys: bool,
    backend: str,
    signature: tuple[object, ...] | None,
) -> Any:
    """Checks, then attends; with a ``signature``, not by way of the dispatcher, and noted for calls like this one."""
    _check_tensors(q, k, v)
    mask = _check_mask(mask, startend_row_indices, causal, q, k)
    head_dim = q.shape[3]
    softmax_scale = head_dim**-0.5 if softmax_scale is None else _number("softmax_scale", softmax_scale)
    if softcap is not None and _number("softcap", softcap) <= 0:
        raise ValueError(f"softcap must be positive, or None for no cap, got {softcap!r}")
    softcap = 0.0 if softcap is None else float(softcap)
    if sinks is not None:
        if not isinstance(sinks, Tensor) or not sinks.is_floating_point():
            raise TypeError(
                f"sinks must be a floating-point tensor, got {getattr(sinks, 'dtype', type(sinks).__name__)}"
            )
        if sinks.shape != (q.shape[2],) or sinks.device != q.device:
            raise ValueError(
                f"sinks must be [Hq] = [{q.shape[2]}] on {q.device}, got {tuple(sinks.shape)} on {sinks.device}"
            )
    if not isinstance(deterministic, bool):
        raise TypeError(f"deterministic must be a bool, got {type(deterministic).__name__}")
    if not isinstance(sort_keys, bool):
        raise TypeError(f"sort_keys must be a bool, got {type(sort_keys).__name__}")
    if sort_keys and mask.shape[1] not in (1, k.shape[2]):
        raise NotImplementedError(
            f"sort_keys=True takes masks of 1 head or of the {k.shape[2]} of k and v, got one a query head "
            f"({mask.shape[1]}), whose orders of a shared key head differ; repeat k and v to {q.shape[2]} heads, or "
            "leave sort_keys out"
        )
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        with torch.autocast(q.device.type, enabled=False):
            out, lse = reference.attention(q, k, v, mask, softmax_scale=softmax_scale, softcap=softcap, sinks=sinks)
    else:
        op.refuse_transforms(q, k, v, sinks)
        given = q, k, v
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in given)
        deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
        if signature is not None:
            out, lse, repeat = op.attention_now(q, k, v, mask, softmax_scale, softcap, sinks, backend)
            if repeat is not None and not return_lse and all(t is of for t, of in zip((q, k, v), given, strict=True)):
                mask._cache["repeat"] = (signature, repeat)
        else:
            out, lse = op.attention(
                q, k, v, mask.bounds, mask.causal, softmax_scale, softcap, sinks, backend, deterministic, sort_keys
            )
    return (out, lse) if return_lse else out


def _number(name: str, value: float) -> float:
    if isinstance(value, (bool, Tensor)) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if t.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")
        if t.ndim != 4 or 0 in t.shape:
            raise ValueError(f"{name} must be a non-empty [B, S, H, D] tensor, got shape {tuple(t.shape)}")
        if t.shape[3] > MAX_HEAD_DIM:
            raise NotImplementedError(f"{name} has head dim {t.shape[3]}; at most {MAX_HEAD_DIM} is supported")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them alike")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device} and {v.device}")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k and v must share the batch size, got {q.shape[0]}, {k.shape[0]} and {v.shape[0]}")
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(f"k and v must share length and heads, got {tuple(k.shape)} and {tuple(v.shape)}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must share the head dim, got {q.shape[3]} and {k.shape[3]}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"the heads of q must be a multiple of those of k and v, got {q.shape[2]} and {k.shape[2]}; "
            "tensors are [B, S, H, D], so transpose(1, 2) those of Transformers"
        )


def _check_mask(
    mask: ColumnMask | None, startend_row_indices: Tensor | None, causal: bool, q: Tensor, k: Tensor
) -> ColumnMask:
    (batch, q_len, heads_q, _), (_, kv_len, heads_kv, _) = q.shape, k.shape
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    if mask is None:
        if startend_row_indices is None:
            return (causal_mask if causal else full_mask)(kv_len, q_len=q_len, device=q.device)
        mask = ColumnMask.from_startend_row_indices(startend_row_indices, causal=causal, q_len=q_len)
    elif startend_row_indices is not None:
        raise ValueError("give the mask once: either mask or startend_row_indices")
    elif not isinstance(mask, ColumnMask):
        hint = "; convert a dense mask with ColumnMask.from_dense(mask)" if isinstance(mask, Tensor) else ""
        raise TypeError(f"mask must be a ColumnMask, got {type(mask).__name__}{hint}")
    elif causal and not mask.causal:
        raise ValueError(
            "causal=True goes with startend_row_indices or no mask; this ColumnMask is not causal by itself"
        )
    if (mask.q_len, mask.kv_len) != (q_len, kv_len):
        raise ValueError(
            f"the mask is for {mask.q_len} queries x {mask.kv_len} keys, but q and k have {q_len} x {kv_len}"
        )
    if mask.shape[0] not in (1, batch):
        raise ValueError(f"the mask's batch must be 1 or {batch}, got {mask.shape[0]}")
    if mask.shape[1] not in (1, heads_kv, heads_q):
        raise ValueError(
            f"the mask's heads must be 1, {heads_kv} (those of k and v) or {heads_q} (those of q), got {mask.shape[1]}"
        )
    if not torch.compiler.is_compiling() and mask.bounds.is_inference() and not torch.is_inference_mode_enabled():
        mask = mask.outside_inference_mode()
    if mask.device != q.device:
        raise ValueError(f"the mask is on {mask.device}, q on {q.device}; use mask.to(q.device)")
    return mask
