"""A softmax scale of 0 or less, for backends that multiply scores by it after looking for their maximum."""

from __future__ import annotations

import torch
from torch import Tensor


def positive_scale(q: Tensor, softmax_scale: float) -> tuple[Tensor, float]:
    """The same scores from a positive scale: a sign goes into q; zero too. ``sign`` brings q's gradient back."""
    if softmax_scale > 0:
        return q, softmax_scale
    return (-q, -softmax_scale) if softmax_scale < 0 else (torch.zeros_like(q), 1.0)


def sign(softmax_scale: float) -> int:
    return (softmax_scale > 0) - (softmax_scale < 0)
