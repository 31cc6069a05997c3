"""Dense attention in plain PyTorch: the oracle of the tests, and a backend for tiny inputs. O(Sq x Sk) memory."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_flashmask.masks import ColumnMask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: ColumnMask,
    *,
    softmax_scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Arguments and results as in :func:`hf_flashmask.flashmask_attention`, ``lse`` always returned.

    Computes in float32, or in float64 for float64 inputs; differentiable by autograd.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, q_len, heads_q, _ = q.shape
    groups = heads_q // k.shape[2]
    # [B, Hq, S, D]
    qf = q.to(compute).transpose(1, 2)
    kf, vf = (t.to(compute).transpose(1, 2).repeat_interleave(groups, 1) for t in (k, v))
    scores = qf @ kf.transpose(-1, -2) * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    visible = mask.to_dense()
    visible = visible.repeat_interleave(heads_q // visible.shape[1], 1) if visible.shape[1] > 1 else visible
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink = sinks.to(compute).view(1, heads_q, 1, 1).expand(batch, heads_q, q_len, 1)
        scores = torch.cat((scores, sink), -1)
    # A row that sees nothing: keep its arithmetic finite, then say what is true of it (output 0, lse -inf).
    alive = (scores > -torch.inf).any(-1, keepdim=True)
    scores = torch.where(alive, scores, 0.0)
    lse = scores.logsumexp(-1, keepdim=True)
    p = torch.where(alive, (scores - lse).exp(), 0.0)[..., : k.shape[1]]
    out = (p @ vf).transpose(1, 2).to(q.dtype)
    return out, torch.where(alive, lse, -torch.inf)[..., 0]
