"""Block-skipping attention in plain PyTorch: any device, the default on a CPU, O(N) extra memory.

Hidden parts of the score matrix are skipped, run by run (``runs.py``). On a CPU a run is one call of torch's fused
attention kernel; elsewhere, and for what that kernel lacks (softcap, gradients of lse), a few batched matmuls. Partial
results meet in the log-sum-exp, and the backward of a run needs only the row's final ``lse``, so both are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hf_flashmask.masks import ColumnMask

from .runs import Kind, RowBlock, Run, RunPlan, cached_plan
from .scale import positive_scale, sign
from .sinks import sink_gradient

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# A mixed run of 256 x 2048 keeps its additive mask (2 MiB in float32) in the cache; others may have 2048 rows as well.
_BLOCK_M, _BLOCK_N = 256, 2048
# The matmul path holds the scores of a run for all heads, so its runs are narrower.
_MATMUL_BLOCK_N = 512
# Elements of one partial result for each thread (512 KiB in float32): long runs take a few heads at a time, but never
# fewer than there are threads, which the fused kernel shares out by heads first.
_PART_ELEMENTS = 1 << 17


class _View(NamedTuple):
    """A part of the batch and heads that shares one mask, laid out so that K and V are never expanded in memory.

    Queries are ``[X, G, S, D]`` and keys ``[X, 1 or G, S, D]``: X the batch and G the heads, or, for grouped queries
    of one batch row, X the key/value heads and G the queries of each.
    """

    batch: slice
    heads_q: slice
    heads_kv: slice
    blocks: tuple[RowBlock, ...]
    start: Tensor  # [2, Sk], this mask's hidden intervals
    end: Tensor

    @property
    def _grouped(self) -> bool:
        n_kv = self.heads_kv.stop - self.heads_kv.start
        return 1 < n_kv < self.heads_q.stop - self.heads_q.start

    def queries(self, t: Tensor) -> Tensor:
        """``[B, S, Hq, D]`` to ``[X, G, S, D]``, a view."""
        t = t[self.batch, :, self.heads_q]
        if not self._grouped:
            return t.transpose(1, 2)
        return t[0].unflatten(1, (self.heads_kv.stop - self.heads_kv.start, -1)).permute(1, 2, 0, 3)

    def keys(self, t: Tensor) -> Tensor:
        """``[B, S, Hkv, D]`` to ``[X, 1 or G, S, D]``, a view."""
        t = t[self.batch, :, self.heads_kv]
        return t[0].transpose(0, 1).unsqueeze(1) if self._grouped else t.transpose(1, 2)

    def rows(self, t: Tensor) -> Tensor:
        """``[B, Hq, S]`` to ``[X, G, S]``, a view."""
        t = t[self.batch, self.heads_q]
        return t[0].unflatten(0, (self.heads_kv.stop - self.heads_kv.start, -1)) if self._grouped else t

    def hidden(self, block: RowBlock, run: Run) -> Tensor:
        """bool ``[R, C]``: the hidden entries of a mixed run."""
        row = torch.arange(block.first, block.last, dtype=torch.int32, device=self.start.device)[:, None]
        start, end = self.start[:, None, run.first : run.last], self.end[:, None, run.first : run.last]
        return ((row >= start[0]) & (row < end[0])) | ((row >= start[1]) & (row < end[1]))


def _views(plan: RunPlan, batch: int, heads_q: int, heads_kv: int, head_dim: int) -> Iterator[_View]:
    mask_batch, mask_heads = plan.start.shape[:2]
    group = heads_q // heads_kv
    for b in range(mask_batch):
        rows = slice(0, batch) if mask_batch == 1 else slice(b, b + 1)
        for h in range(mask_heads):
            blocks = plan.blocks[b][h]
            shared = (blocks, plan.start[b, h], plan.end[b, h])
            if mask_heads > 1:
                n = heads_q // mask_heads
                first_kv = h * n // group
                yield _View(rows, slice(h * n, (h + 1) * n), slice(first_kv, first_kv + 1), *shared)
                continue
            widest = max((block.extent() for block in blocks), default=1)
            for rows_part, kv in _parts(rows, heads_kv, group, group * widest * head_dim):
                yield _View(rows_part, slice(kv.start * group, kv.stop * group), kv, *shared)


def _parts(rows: slice, heads_kv: int, group: int, elements: int) -> Iterator[tuple[slice, slice]]:
    """Cut batch rows x key/value heads so that a run's partial results stay near _PART_ELEMENTS a thread.

    Args:
        elements: those of one key/value head of one batch row.
    """
    n_rows, threads = rows.stop - rows.start, torch.get_num_threads()
    fit = max(-(-threads // group), _PART_ELEMENTS * threads // elements)
    if group > 1 and n_rows > 1 and heads_kv > 1:
        # K and V are shared along one axis only (see _View), so one of the two is taken singly.
        row_step, head_step = (1, min(heads_kv, fit)) if heads_kv > n_rows else (min(n_rows, fit), 1)
    else:
        head_step = min(heads_kv, fit)
        row_step = min(n_rows, max(1, fit // heads_kv))
    for b in range(rows.start, rows.stop, row_step):
        for h in range(0, heads_kv, head_step):
            yield slice(b, min(b + row_step, rows.stop)), slice(h, min(h + head_step, heads_kv))


# ---- one run ---------------------------------------------------------------------------------------------------


def _expand(t: Tensor, like: Tensor) -> Tensor:
    return t.expand(-1, like.shape[1], -1, -1) if t.shape[1] != like.shape[1] else t


def _bias(hidden: Tensor | None, like: Tensor) -> Tensor | None:
    if hidden is None:
        return None
    return torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -torch.inf)


def _fused_run(
    q: Tensor, k: Tensor, v: Tensor, kind: Kind, hidden: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = _fused(
        q, _expand(k, q), _expand(v, q), 0.0, kind == Kind.CAUSAL, attn_mask=_bias(hidden, q), scale=scale
    )
    if hidden is not None:
        # The kernel reports lse 0 for rows that see nothing of the run.
        lse = lse.masked_fill(hidden.all(-1), -torch.inf)
    return out, lse


def _scores(q: Tensor, k: Tensor, hidden: Tensor | None, scale: float, softcap: float) -> Tensor:
    """Capped and masked scores ``[X, G, R, C]`` of float32 or float64 inputs."""
    s = torch.matmul(q * scale, k.transpose(-1, -2))
    if softcap:
        s = s.div_(softcap).tanh_().mul_(softcap)
    return s if hidden is None else s.masked_fill_(hidden, -torch.inf)


def _matmul_run(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, scale: float, softcap: float, compute: torch.dtype
) -> tuple[Tensor, Tensor]:
    s = _scores(q.to(compute), k.to(compute), hidden, scale, softcap)
    lse = s.logsumexp(-1)
    p = s.sub_(_finite(lse).unsqueeze(-1)).exp_()
    return torch.matmul(p, v.to(compute)), lse


def _matmul_run_backward(
    do: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    hidden: Tensor | None,
    scale: float,
    softcap: float,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, do = (t.to(compute) for t in (q, k, v, do))
    s = _scores(q, k, hidden, scale, softcap)
    p = (s - lse.unsqueeze(-1)).exp_()
    dv = torch.matmul(p.transpose(-1, -2), do)
    ds = torch.matmul(do, v.transpose(-1, -2)).sub_(delta.unsqueeze(-1)).mul_(p)
    if softcap:
        # d/dx of c tanh(x / c) is 1 - (s / c)^2; hidden entries have p = 0, and s = -inf must not meet it.
        s = s if hidden is None else s.masked_fill_(hidden, 0.0)
        ds = ds.mul_(1 - (s / softcap) ** 2)
    ds = ds.mul_(scale)
    return torch.matmul(ds, k), torch.matmul(ds.transpose(-1, -2), q), dv


def _finite(lse: Tensor) -> Tensor:
    """lse with 0 for rows that see nothing: their scores are all -inf, so exp(score - lse) is 0 as it should be."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


# ---- all runs --------------------------------------------------------------------------------------------------


def _pad_heads(*tensors: Tensor) -> list[Tensor]:
    """Zero-pad to one head dim, which the fused kernel asks for; zeros change neither scores nor outputs."""
    width = max(t.shape[-1] for t in tensors)
    return [torch.nn.functional.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in tensors]


def _plan(mask: ColumnMask, fused: bool) -> RunPlan:
    return cached_plan(mask, _BLOCK_M, _BLOCK_N if fused else _MATMUL_BLOCK_N, squares=fused)


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: ColumnMask, softmax_scale: float, softcap: float, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q ``[B, Sq, Hq, D]``, k ``[B, Sk, Hkv, D]``, v ``[B, Sk, Hkv, Dv]`` to out ``[B, Sq, Hq, Dv]`` and lse.

    lse is ``[B, Hq, Sq]``, float32, or float64 for float64 inputs.
    """
    q, softmax_scale = positive_scale(q, softmax_scale)
    batch, q_len, heads_q, _ = q.shape
    head_dim_v = v.shape[-1]
    fused = q.device.type == "cpu" and not softcap
    compute = _accumulate_dtype(q.dtype)
    out = q.new_zeros(batch, q_len, heads_q, head_dim_v)
    lse = q.new_full((batch, heads_q, q_len), -torch.inf, dtype=compute)
    if fused:
        q, k, v = _pad_heads(q, k, v)
    for view in _views(_plan(mask, fused), batch, heads_q, k.shape[2], q.shape[3]):
        vq, vk, vv, vout, vlse = view.queries(q), view.keys(k), view.keys(v), view.queries(out), view.rows(lse)
        for block in view.blocks:
            rows = slice(block.first, block.last)
            total: tuple[Tensor, Tensor] | None = None
            for run in block.runs:
                columns = slice(run.first, run.last)
                hidden = view.hidden(block, run) if run.kind == Kind.MIXED else None
                qr, kr, vr = vq[:, :, rows], vk[:, :, columns], vv[:, :, columns]
                if fused:
                    part = _fused_run(qr, kr, vr, run.kind, hidden, softmax_scale)
                else:
                    part = _matmul_run(qr, kr, vr, hidden, softmax_scale, softcap, compute)
                total = part if total is None else _combine(total, part)
            if total is not None:
                vout[:, :, rows], vlse[:, :, rows] = total[0][..., :head_dim_v], total[1]
    if sinks is not None:
        without = lse
        lse = torch.logaddexp(lse, sinks.to(compute)[:, None])
        out *= (without - _finite(lse)).exp().transpose(1, 2).unsqueeze(-1).to(out.dtype)
    return out, lse


def _combine(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(a[1], b[1])
    base = _finite(lse)
    weighted = [o.to(lse.dtype) * (part - base).exp().unsqueeze(-1) for o, part in (a, b)]
    return weighted[0].add_(weighted[1]), lse


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
    """Gradients of q, k, v and sinks, in their shapes and dtypes."""
    given_scale = softmax_scale
    q, softmax_scale = positive_scale(q, softmax_scale)
    batch, _, heads_q, head_dim = q.shape
    head_dim_v = v.shape[-1]
    fused = q.device.type == "cpu" and not softcap and dlse is None
    compute = _accumulate_dtype(q.dtype)
    dsinks, delta = None, None
    if sinks is not None or not fused:
        # [B, Hq, Sq]: what softmax's backward subtracts, less what lse's own gradient adds.
        delta = (do.to(compute) * out.to(compute)).sum(-1).transpose(1, 2)
        delta = delta if dlse is None else delta - dlse
    if sinks is not None and delta is not None:
        dsinks = sink_gradient(sinks, lse, delta)
    safe = _finite(lse)
    if fused:
        q, k, v, do, out = _pad_heads(q, k, v, do, out)
    dq, dk, dv = (torch.zeros(t.shape, dtype=compute, device=t.device) for t in (q, k, v))
    for view in _views(_plan(mask, fused), batch, heads_q, k.shape[2], q.shape[3]):
        vq, vk, vv, vdo, vout = view.queries(q), view.keys(k), view.keys(v), view.queries(do), view.queries(out)
        vdq, vdk, vdv, vlse = view.queries(dq), view.keys(dk), view.keys(dv), view.rows(safe)
        vdelta = None if delta is None else view.rows(delta)
        for block in view.blocks:
            rows = slice(block.first, block.last)
            for run in block.runs:
                columns = slice(run.first, run.last)
                hidden = view.hidden(block, run) if run.kind == Kind.MIXED else None
                qr, kr, vr = vq[:, :, rows], vk[:, :, columns], vv[:, :, columns]
                dor, lser = vdo[:, :, rows], vlse[:, :, rows]
                if fused or vdelta is None:
                    grads = _fused_backward(
                        dor, qr, _expand(kr, qr), _expand(vr, qr), vout[:, :, rows], lser, 0.0,
                        run.kind == Kind.CAUSAL, attn_mask=_bias(hidden, qr), scale=softmax_scale,
                    )  # fmt: skip
                else:
                    grads = _matmul_run_backward(
                        dor, vdelta[:, :, rows], qr, kr, vr, lser, hidden, softmax_scale, softcap, compute
                    )
                vdq[:, :, rows] += grads[0]
                for target, grad in ((vdk, grads[1]), (vdv, grads[2])):
                    if target.shape[1] != grad.shape[1]:
                        grad = grad.sum(1, keepdim=True, dtype=compute)
                    target[:, :, columns] += grad
                del grads, grad  # or they would live beside the next run's
    if given_scale <= 0:
        dq *= sign(given_scale)
    return (
        dq[..., :head_dim].to(q.dtype),
        dk[..., :head_dim].to(k.dtype),
        dv[..., :head_dim_v].to(v.dtype),
        dsinks,
    )
