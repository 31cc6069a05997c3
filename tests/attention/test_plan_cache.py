"""What is planned for a mask is remembered as long as it holds, and no longer."""

import gc

import torch

from hf_flashmask import ColumnMask, flashmask_attention, masks
from hf_flashmask.attention import plan


def test_remembered_by_bounds_and_key():
    mask, made = masks.causal(8), []
    for _ in range(2):
        for key in ("a", "b"):
            plan.cached(ColumnMask(mask.bounds, causal=True), key, lambda: made.append(1) or len(made))
    assert len(made) == 2
    plan.cached(ColumnMask(mask.bounds.clone(), causal=True), "a", lambda: made.append(1))
    plan.cached(ColumnMask(mask.bounds, causal=True, q_len=4), "a", lambda: made.append(1))
    assert len(made) == 4


def test_bounds_that_are_written_to_are_planned_anew_and_the_old_plan_goes():
    mask = ColumnMask(masks.causal(8).bounds.clone(), causal=True)
    for step in range(5):
        assert plan.cached(mask, "key", lambda step=step: step) == step
        mask.bounds.add_(1)
    assert len(plan._plans[mask.bounds]) == 1


def test_a_plan_goes_with_its_bounds():
    gc.collect()
    before = len(plan._plans)
    mask = masks.causal_document(lengths=[100, 60])
    q = torch.randn(1, 160, 2, 8)
    flashmask_attention(q, q, q, mask)
    assert len(plan._plans) == before + 1
    del mask
    gc.collect()
    assert len(plan._plans) == before


def test_inference_plans_serve_training():
    mask = masks.causal_document(lengths=[40, 24])
    q = torch.randn(1, 64, 2, 8)
    with torch.inference_mode():
        flashmask_attention(q, q, q, mask)
    q.requires_grad_()
    flashmask_attention(q, q, q, mask).sum().backward()
    assert q.grad.isfinite().all()
