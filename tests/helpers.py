"""Oracles and random masks, written without the code under test."""

import torch

from hf_flashmask import ColumnMask


def hidden_by_definition(bounds, causal, q_len):
    """bool [B, Hm, Sq, Sk], True = hidden, straight from the table in ColumnMask's docstring."""
    kv_len = bounds.shape[3]
    i = torch.arange(q_len)[:, None]
    j = torch.arange(kv_len)[None]
    b = [bounds[:, :, c, None, :] for c in range(bounds.shape[2])]
    if causal:
        below = (i >= b[0]) & (i < (b[1] if len(b) == 2 else q_len))
        return below | (i < j - (kv_len - q_len))
    if len(b) == 2:
        return (i >= b[0]) | (i < b[1])
    return ((i >= b[0]) & (i < b[1])) | ((i >= b[2]) & (i < b[3]))


def random_mask(q_len, kv_len, *, causal, vectors, batch=1, heads=1, generator=None):
    """Bounds in either order, empty, overlapping and out of range."""
    bounds = torch.randint(-3, q_len + 4, (batch, heads, vectors, kv_len), generator=generator, dtype=torch.int32)
    return ColumnMask(bounds, causal=causal, q_len=q_len)


def relative(actual, expected):
    """Relative Frobenius error; an expectation of nothing but rounding counts as 0.05 an entry."""
    floor = 5e-2 * expected.numel() ** 0.5
    return float((actual.double() - expected.double()).norm() / max(float(expected.double().norm()), floor))
