"""Forward and backward kernels in the interpreter, against dense attention in float64: every branch that they have."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from hf_flashmask import ColumnMask, flashmask_attention, masks
from hf_flashmask.attention.triton import plan
from tests.attention.triton_checks import compare
from tests.helpers import random_mask

ALL = {"softcap": 5.0, "sinks": True, "dlse": True}


def document(q_len=50):
    """Hidden, partial and full tiles; fewer queries than keys."""
    return masks.causal_document(lengths=[37, 34])[:, :, 71 - q_len :]


# What it is about: (mask, shapes and features, how the kernels are configured).
CASES = {
    "one bound": (lambda: masks.causal(71), {"kv_heads": 2, "batch": 1}, {}),
    "one branching loop": (document, {"batch": 1, "heads": 2, "kv_heads": 1, "d": 24, **ALL}, {"merge": True}),
    "descriptors": (document, {"batch": 1, "kv_heads": 2, "dv": 24, **ALL, "transposed": True}, {"tma": True}),
    "descriptors, one loop": (
        lambda: random_mask(40, 35, causal=True, vectors=1), {"batch": 1, "heads": 2, "kv_heads": 1, "dv": 40},
        {"tma": True, "merge": True},
    ),
    "two bounds, causal, masks a head": (
        lambda: random_mask(33, 50, causal=True, vectors=2, batch=2, heads=4),
        {"kv_heads": 2, "dlse": True}, {"block_n": 32, "in_registers": True},
    ),
    "two bounds, masks a key head": (
        lambda: random_mask(50, 33, causal=False, vectors=2, heads=2), {"kv_heads": 2, "sinks": True},
        {"block_m": 32},
    ),
    "four bounds, masks a batch row": (
        lambda: random_mask(45, 50, causal=False, vectors=4, batch=2), {"heads": 3, "kv_heads": 1, **ALL},
        {"tma": True, "in_registers": True},
    ),
    "more rows than keys": (lambda: masks.causal(20, q_len=50), {"batch": 1, "heads": 2, "kv_heads": 2, **ALL}, {}),
    "one query": (lambda: masks.causal(40, q_len=1), {"kv_heads": 1, "d": 72, "dv": 16}, {}),
    "one key": (lambda: masks.full(1, q_len=20), {"kv_heads": 4, "sinks": True, "dlse": True}, {}),
    # Each kernel reads what another wrote, in blocks of its own.
    "large blocks of queries last": (
        lambda: document(40), {"batch": 1, "heads": 2, "kv_heads": 2},
        {"forward": (64, 16), "dq": (16, 32), "dkdv": (64, 16)},
    ),
    "large blocks of queries first": (
        document, {"batch": 1, "heads": 2, "kv_heads": 2}, {"forward": (16, 32), "dq": (64, 16), "dkdv": (16, 64)}
    ),
    "sorted keys, masks a key head": (
        lambda: random_mask(40, 70, causal=True, vectors=1, batch=2, heads=2),
        {"kv_heads": 2, "d": 24, "dv": 40, "sort_keys": True, **ALL}, {},
    ),
    "sorted keys": (lambda: masks.random_eviction(70), {"kv_heads": 1, "sort_keys": True, "transposed": True}, {}),
    "negative scale": (
        document, {"batch": 1, "heads": 2, "kv_heads": 2, "scale": -0.3, "sinks": True}, {"tma": True}
    ),
    "scale zero": (document, {"batch": 1, "heads": 2, "kv_heads": 2, "scale": 0.0, "dlse": True}, {}),
    "large scores": (
        document, {"batch": 1, "heads": 2, "kv_heads": 2, "scores": 30.0, "tol": 1e-4, "grad_tol": 1e-3}, {}
    ),
    # The interpreter multiplies the bits of bfloat16 as if they were integers, so this is all of 16 bits.
    "float16": (document, {"batch": 1, "kv_heads": 2, "dtype": torch.float16, "transposed": True}, {"tma": True}),
    "float16 in registers": (
        document, {"batch": 1, "heads": 2, "kv_heads": 2, "dtype": torch.float16, **ALL}, {"in_registers": True}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_against_dense_attention(name, kernels):
    mask, features, config = CASES[name]
    kernels(**config)
    compare(mask(), **features)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_and_columns_that_see_nothing(sinks, kernels):
    """Rows that meet no tile, rows hidden in visited tiles, hidden columns among visible ones."""
    lts = torch.full((48,), 40)
    lts[:20] = 0
    lts[25] = 0
    mask = ColumnMask(torch.stack((lts, torch.full((48,), 18)))[None, None].int(), causal=False, q_len=50)
    compare(mask, batch=1, heads=2, kv_heads=1, sinks=sinks, dlse=True)
    q, k, v = (torch.randn(1, n, 1, 16, requires_grad=True) for n in (50, 48, 48))
    out, lse = flashmask_attention(q, k, v, mask, return_lse=True, backend="triton")
    dead = torch.ones(50, dtype=torch.bool)
    dead[18:40] = False
    assert torch.equal(lse[0, 0] == -torch.inf, dead)
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    for t, where in ((out, dead), (dq, dead), (dk, lts == 0), (dv, lts == 0)):
        assert (t[0, where] == 0).all()
        assert (t[0, ~where] != 0).any()


def test_nothing_is_visible(kernels):
    mask = ColumnMask(torch.zeros(1, 1, 1, 20, dtype=torch.int32), causal=True)
    compare(mask, batch=1, heads=2, kv_heads=2, **ALL)


def test_lines_with_more_spans_than_fit(kernels, monkeypatch):
    monkeypatch.setattr(plan, "MAX_SPANS", 1)
    compare(masks.global_sliding_window(60, 5, 9), batch=1, heads=1, kv_heads=1)


@pytest.mark.parametrize("tma", [False, True])
def test_hidden_tiles_are_not_read(tma, kernels):
    """Were they, NaN times a weight of zero would be NaN."""
    kernels(tma=tma)
    mask = masks.causal_document(lengths=[32, 24])
    q, k, v = (torch.randn(1, 56, 1, 16) for _ in range(3))

    def grads(q, k, v):
        tensors = [t.clone().requires_grad_() for t in (q, k, v)]
        out = flashmask_attention(*tensors, mask, backend="triton")
        return out, *torch.autograd.grad(out[:, 32:].sum(), tensors)

    expected = grads(q, k, v)
    k[:, :32], v[:, :32] = torch.nan, torch.nan
    for t, wanted in zip(grads(q, k, v), expected, strict=True):
        assert torch.equal(t[:, 32:], wanted[:, 32:])


def test_strides_as_they_come(kernels):
    """Broadcast heads, gaps between rows, a last dimension that is not dense; what descriptors cannot address."""
    kernels(tma=True)
    mask = masks.causal(20)
    q = torch.randn(1, 20, 2, 40)[..., 3:19]
    k = torch.randn(1, 20, 1, 16).expand(1, 20, 2, 16)
    v = torch.randn(1, 20, 16, 2).transpose(2, 3)

    def run(tensors, backend):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = flashmask_attention(*tensors, mask, backend=backend)
        # The gradient of a sum over heads is a broadcast.
        return out, *torch.autograd.grad(out.sum(2).square().sum(), tensors)

    expected = run([t.double() for t in (q, k, v)], "reference")
    for t, wanted in zip(run((q, k, v), "triton"), expected, strict=True):
        torch.testing.assert_close(t.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture
def lists(monkeypatch):
    """The arguments of every list that is made."""
    made, build = [], plan.build

    def counted(mask, *shape, by_columns):
        made.append((mask.bounds.data_ptr(), *shape, by_columns))
        return build(mask, *shape, by_columns=by_columns)

    monkeypatch.setattr(plan, "build", counted)
    return made


def layer(x, mask):
    q, k, v = (x * s for s in (1.0, 0.5, 2.0))
    return flashmask_attention(q, k, v, mask, backend="triton")


def test_layers_forward_and_backward_share_lists(kernels, lists):
    mask = masks.causal(20)
    x = torch.randn(1, 20, 1, 16, requires_grad=True)
    for _ in range(2):
        layer(layer(x, mask), ColumnMask(mask.bounds, causal=True)).sum().backward()
    assert sorted(made[1:] for made in lists) == [(16, 16, False), (16, 16, True)]
    with torch.inference_mode():
        layer(x, mask)
    assert len(lists) == 2
    mask.bounds.fill_(3)  # against the rules, but not silently wrong
    compare(mask, batch=1, heads=1, kv_heads=1)
    assert len(lists) == 4


def test_lists_made_in_inference_mode_serve_training(kernels, lists):
    mask = masks.causal(20)
    x = torch.randn(1, 20, 1, 16, requires_grad=True)
    with torch.inference_mode():
        layer(x, mask)
    layer(x, mask).sum().backward()
    assert len(lists) == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_shares_lists(reentrant, kernels, lists):
    mask = masks.causal(20)
    x = torch.randn(1, 20, 1, 16, requires_grad=True)
    y = x
    for _ in range(2):
        y = checkpoint(layer, y, mask, use_reentrant=reentrant)
    (dx,) = torch.autograd.grad(y.sum(), x) if not reentrant else (None,)
    if reentrant:
        y.sum().backward()
        dx = x.grad
    assert len(lists) == 2
    (expected,) = torch.autograd.grad(layer(layer(x, mask), mask).sum(), x)
    assert torch.equal(dx, expected)
