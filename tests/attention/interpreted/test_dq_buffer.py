"""The passes before and after Hopper's backward, which are portable, against torch."""

import importlib
import math
import types

import pytest
import torch

from hf_flashmask.attention.hopper.dq_buffer import finish_kernel, prepare_kernel


@pytest.mark.parametrize("width", [64, 128, 256])
def test_rows_come_back_in_order(width, monkeypatch):
    """finish_kernel undoes what the backward kernel does to a block; Gluon's reshape and permute are torch's here."""
    common = importlib.import_module("hf_flashmask.attention.hopper.backward_common")
    monkeypatch.setattr(common, "gl", types.SimpleNamespace(reshape=torch.reshape, permute=torch.permute))
    batch, heads, q_len, head_dim = 2, 3, 150, width - 8
    blocks = math.ceil(q_len / 64)
    rows = torch.randn(batch, heads, blocks * 64, width)
    parts = [part for block in rows.reshape(-1, 64, width) for part in block.split(64, dim=1)]
    buffer = torch.stack([common.in_thread_order.fn(part) for part in parts])
    assert buffer.shape[1:] == (128, 32)
    dq = torch.empty(batch, q_len, heads, head_dim)
    finish_kernel[(batch * heads * blocks,)](
        buffer, dq, dq.stride(0), dq.stride(2), dq.stride(1), q_len, heads, blocks, 0.5, head_dim, 64, width
    )
    assert torch.equal(dq, 0.5 * rows[:, :, :q_len, :head_dim].transpose(1, 2))


def test_statistics_and_zeros():
    batch, heads, q_len, head_dim = 2, 3, 70, 40
    out, do = (torch.randn(batch, q_len, heads, head_dim) for _ in range(2))
    lse, dlse = (torch.randn(batch, heads, q_len) for _ in range(2))
    lse[:, :, 5] = -torch.inf
    stats, buffer = torch.empty(batch * heads * 2, 2, 64), torch.empty(batch * heads * 2, 64 * 64)
    strides = out.stride(0), out.stride(2), out.stride(1)
    prepare_kernel[(batch * heads * 2,)](
        out, do, lse, dlse, stats, buffer, *strides, *strides, q_len, heads, 2, 3.0, head_dim, 64, 64, True
    )
    assert (buffer == 0).all()
    scaled, delta = stats.view(batch, heads, 2, 2, 64).transpose(2, 3).reshape(batch, heads, 2, 128).unbind(2)
    expected = torch.where(lse == -torch.inf, -torch.inf, -3 * lse)
    torch.testing.assert_close(scaled, torch.nn.functional.pad(expected, (0, 58), value=-torch.inf))
    expected = dlse - (out * do).sum(-1).transpose(1, 2)
    torch.testing.assert_close(delta, torch.nn.functional.pad(expected, (0, 58)))
