"""What kernels are checked against before they are timed: dense float32 attention, sampled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_flashmask.masks import ColumnMask

TOLERANCE = 0.02  # relative Frobenius error
SAMPLED = 256
CHUNK_ELEMENTS = 1 << 28  # of the score matrix, at a time


@dataclass(frozen=True)
class Reference:
    """Some rows of out and dq and some columns of dk and dv: float32 ``[heads, sampled, D]``, of the last batch row."""

    heads: tuple[int, ...]
    rows: Tensor
    columns: Tensor
    out: Tensor
    grads: tuple[Tensor, Tensor, Tensor]  # dq, dk, dv

    def forward_error(self, out: Tensor) -> float:
        return self._error(out, self.rows, self.out)

    def backward_error(self, grads: tuple[Tensor, ...]) -> float:
        """The largest of dq, dk and dv."""
        at = (self.rows, self.columns, self.columns)
        return max(self._error(*args) for args in zip(grads, at, self.grads, strict=True))

    def _error(self, got: Tensor, at: Tensor, expected: Tensor) -> float:
        """Relative Frobenius error of ``got [B, S, H, D]``; infinite when any value of it is not finite."""
        if not bool(torch.isfinite(got).all()):
            return float("inf")
        chosen = torch.stack([got[-1, at, head].float() for head in self.heads])
        return float((chosen - expected).norm() / expected.norm().clamp_min(1e-30))


def reference(q: Tensor, k: Tensor, v: Tensor, do: Tensor, mask: ColumnMask) -> Reference:
    """First and last head of the last batch row, with sampled rows and columns. All tensors are ``[B, S, H, D]``.

    Memory is a few chunks of the score matrix, whatever the length.
    """
    seq_len, n_heads = q.shape[1], q.shape[2]
    heads = tuple(sorted({0, n_heads - 1}))
    generator = torch.Generator().manual_seed(0)
    rows, columns = (
        torch.randperm(seq_len, generator=generator)[:SAMPLED].sort().values.to(q.device) for _ in range(2)
    )
    parts = [
        _one_head(q[-1, :, h], k[-1, :, h], v[-1, :, h], do[-1, :, h], mask=mask, rows=rows, columns=columns)
        for h in heads
    ]
    out, *grads = (torch.stack(part) for part in zip(*parts, strict=True))
    return Reference(heads, rows, columns, out, (grads[0], grads[1], grads[2]))


def _one_head(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, *, mask: ColumnMask, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, dq at the rows and dk, dv at the columns; ``q`` and the others are ``[S, D]``."""
    q, k, v, do = (t.float() for t in (q, k, v, do))
    (seq_len, head_dim), scale = q.shape, q.shape[1] ** -0.5
    outs, dqs = [], []
    dk, dv = q.new_zeros(columns.numel(), head_dim), q.new_zeros(columns.numel(), head_dim)
    step = max(1, CHUNK_ELEMENTS // seq_len)
    for first in range(0, seq_len, step):
        last = min(first + step, seq_len)
        scores = (q[first:last] @ k.T).mul_(scale).masked_fill_(mask.masked_rows(first, last)[0, 0], float("-inf"))
        # A row that sees nothing has lse -inf and nan here: its weights are 0.
        p = scores.sub_(scores.logsumexp(-1, keepdim=True)).exp_().nan_to_num_(0.0)
        out, d = p @ v, do[first:last]
        delta = (out * d).sum(-1, keepdim=True)
        p_columns = p[:, columns]
        dv += p_columns.T @ d
        dk += (p_columns * (d @ v[columns].T - delta)).T @ q[first:last] * scale
        here = rows[(rows >= first) & (rows < last)] - first
        outs.append(out[here])
        dqs.append((p[here] * (d[here] @ v.T - delta[here])) @ k * scale)
    return torch.cat(outs), torch.cat(dqs), dk, dv
