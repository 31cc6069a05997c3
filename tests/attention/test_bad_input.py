"""Bad input gets an error that names the argument and the remedy, before anything is computed."""

import importlib.util

import pytest
import torch

from hf_flashmask import ColumnMask, flashmask_attention, masks
from hf_flashmask.attention import backends


def qkv(batch=2, q_len=8, kv_len=8, heads=4, kv_heads=2, d=16, dtype=torch.float32):
    return (
        torch.randn(batch, q_len, heads, d).to(dtype),
        torch.randn(batch, kv_len, kv_heads, d).to(dtype),
        torch.randn(batch, kv_len, kv_heads, d).to(dtype),
    )


Q, K, V = qkv()
IDX = masks.causal(8).startend_row_indices
attend = flashmask_attention

CASES = {
    "q is no tensor": (lambda: attend([1.0], K, V), TypeError, "q must be a torch.Tensor"),
    "integer q": (lambda: attend(Q.int(), K, V), TypeError, "q must be float16"),
    "rank": (lambda: attend(Q[0], K, V), ValueError, r"q must be a non-empty \[B, S, H, D\]"),
    "empty": (lambda: attend(Q[:, :0], K, V), ValueError, "q must be a non-empty"),
    "head dim": (lambda: attend(*qkv(d=513)), NotImplementedError, "at most 512"),
    "mixed dtypes": (lambda: attend(Q.half(), K, V), TypeError, "share a dtype.*cast"),
    "devices": (lambda: attend(Q.to("meta"), K, V), ValueError, "one device"),
    "batches": (lambda: attend(Q[:1], K, V), ValueError, "share the batch size"),
    "k and v lengths": (lambda: attend(Q, K[:, :4], V), ValueError, "k and v must share length"),
    "q and k head dims": (lambda: attend(Q[..., :8], K, V), ValueError, "share the head dim"),
    "head counts": (lambda: attend(Q[:, :, :3], K, V), ValueError, "must be a multiple.*transpose"),
    "dense mask": (lambda: attend(Q, K, V, masks.causal(8).to_dense()), TypeError, "ColumnMask.from_dense"),
    "mask length": (lambda: attend(Q, K, V, masks.causal(9)), ValueError, "9 queries x 9 keys, but q and k have 8 x 8"),
    "mask rows": (lambda: attend(Q, K, V, masks.causal(8, q_len=4)), ValueError, "4 queries x 8 keys"),
    "mask batch": (lambda: attend(Q, K, V, masks.random_eviction(8, batch_size=3)), ValueError, "batch must be 1 or 2"),
    "mask heads": (lambda: attend(Q, K, V, masks.random_eviction(8, num_heads=3)), ValueError, "heads must be 1, 2"),
    "mask device": (lambda: attend(Q, K, V, masks.causal(8).to("meta")), ValueError, r"mask.to\(q.device\)"),
    "two masks": (
        lambda: attend(Q, K, V, masks.causal(8), startend_row_indices=IDX), ValueError, "give the mask once"
    ),
    "causal beside a mask": (lambda: attend(Q, K, V, masks.full(8), causal=True), ValueError, "not causal by itself"),
    "causal is no bool": (lambda: attend(Q, K, V, causal=1), TypeError, "causal must be a bool"),
    "deterministic is no bool": (lambda: attend(Q, K, V, deterministic="yes"), TypeError, "deterministic must be a"),
    "sort_keys is no bool": (lambda: attend(Q, K, V, sort_keys=1024), TypeError, "sort_keys must be a bool, got int"),
    "orders a query head": (
        lambda: attend(Q, K, V, masks.random_eviction(8, num_heads=4), sort_keys=True),
        NotImplementedError, "1 head or of the 2 of k and v.*repeat k and v to 4 heads",
    ),
    "window of columns": (lambda: masks.causal(8).sort_columns(0), ValueError, "window must be a positive int, got 0"),
    "indices of int64": (
        lambda: attend(Q, K, V, startend_row_indices=IDX.long(), causal=True), TypeError, r"int32.*\.to\(torch.int32\)"
    ),
    "indices of rank 3": (
        lambda: attend(Q, K, V, startend_row_indices=IDX[0], causal=True), ValueError, r"\[B, Hm, Sk, C\]"
    ),
    "one bound, not causal": (
        lambda: attend(Q, K, V, startend_row_indices=IDX), ValueError, "causal=False takes 2 or 4 bound vectors"
    ),
    "four bounds, causal": (
        lambda: attend(Q, K, V, startend_row_indices=IDX.expand(-1, -1, -1, 4), causal=True), ValueError, "1 or 2"
    ),
    "scale": (lambda: attend(Q, K, V, softmax_scale=float("nan")), ValueError, "softmax_scale must be a finite"),
    "softcap": (lambda: attend(Q, K, V, softcap=0.0), ValueError, "softcap must be positive"),
    "sinks shape": (lambda: attend(Q, K, V, sinks=torch.zeros(2)), ValueError, r"sinks must be \[Hq\] = \[4\]"),
    "sinks dtype": (lambda: attend(Q, K, V, sinks=torch.zeros(4).int()), TypeError, "sinks must be a floating"),
    "backend": (lambda: attend(Q, K, V, backend="cuda"), ValueError, "backend must be one of auto, reference, torch"),
    "unknown keyword": (lambda: attend(Q, K, V, dropout=0.1), TypeError, "dropout"),
    "bounds dtype": (lambda: ColumnMask(torch.zeros(1, 1, 1, 8), causal=True), TypeError, "bounds must be int32"),
    "bounds rank": (lambda: ColumnMask(IDX[0], causal=True), ValueError, "bounds must be a non-empty"),
    "q_len": (lambda: ColumnMask(masks.causal(8).bounds, causal=True, q_len=0), ValueError, "q_len must be"),
    "float mask that is a bias": (
        lambda: ColumnMask.from_dense(torch.full((1, 1, 4, 4), -3.0)), ValueError, r"mask\[0, 0, 0, 0\] is -3.0"
    ),
    "float mask with NaN": (lambda: ColumnMask.from_dense(torch.full((1, 1, 4, 4), torch.nan)), ValueError, "is nan"),
    "integer mask": (lambda: ColumnMask.from_dense(torch.ones(1, 1, 4, 4).int()), TypeError, r"mask.bool\(\)"),
    "2-D mask": (lambda: ColumnMask.from_dense(torch.ones(4, 4).bool()), ValueError, r"\[B\|1, H\|1, Sq, Sk\]"),
    "mask with three holes": (
        lambda: ColumnMask.from_dense(torch.tensor([1, 0] * 3).bool().view(1, 1, 6, 1)), ValueError, "3 separate"
    ),
    "float intervals": (
        lambda: ColumnMask.from_masked_intervals(torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 1, 4), q_len=4),
        TypeError, "start must be an integer",
    ),
    "plot of no such head": (lambda: masks.random_eviction(8, num_heads=2).draw(head=2), ValueError, "head must be in"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_refused_with_a_remedy(name):
    call, error, message = CASES[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton package")
@pytest.mark.parametrize(
    ("options", "obstacle"),
    [
        ({"dtype": torch.float64}, "has no float64"),
        ({"d": 300}, "serves head dims up to 256, got 300 and 300"),
        ({}, "needs a GPU, got CPU tensors"),
    ],
)
def test_triton_is_never_replaced(options, obstacle, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match=f"backend='triton' {obstacle}; use backend='auto' or 'torch'"):
        attend(*qkv(**options), masks.causal(8), backend="triton")
    attend(*qkv(**options), masks.causal(8), backend="auto")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton package")
def test_hopper_is_never_replaced(monkeypatch):
    with pytest.raises(NotImplementedError, match="backend='hopper' serves compute capability 9.0 .Hopper., got cpu"):
        attend(*qkv(), masks.causal(8), backend="hopper")
    monkeypatch.setattr(backends, "_has_gluon", lambda: False)
    with pytest.raises(NotImplementedError, match="backend='hopper' needs Triton 3.6 or newer with Gluon"):
        attend(*qkv(), masks.causal(8), backend="hopper")
