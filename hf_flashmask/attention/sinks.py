"""The gradient of attention sinks, which every backend has from the same two row statistics."""

import torch
from torch import Tensor


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Gradient of ``sinks [Hq]``, in its dtype.

    Args:
        lse: ``[B, Hq, Sq]``, sinks included.
        delta: ``[B, Hq, Sq]``: rowsum(out * do) less the gradient of lse.
    """
    # A row with lse -inf sees nothing, a sink of -inf included.
    weight = (sinks.to(lse.dtype)[:, None] - lse).exp().masked_fill(lse == -torch.inf, 0.0)
    return -(weight * delta).sum((0, 2)).to(sinks.dtype)
