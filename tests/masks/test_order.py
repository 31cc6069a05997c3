"""Sorting columns: the same mask in another order, in which more tiles are hidden or full."""

from pathlib import Path

import pytest
import torch

from hf_flashmask import ColumnMask, masks
from hf_flashmask.bench import kernel_masks
from tests.helpers import hidden_by_definition, random_mask


@pytest.mark.parametrize("window", [None, 1, 16, 1000])
@pytest.mark.parametrize("kind", [(True, 1), (True, 2), (False, 2), (False, 4)])
def test_the_same_columns_by_when_they_are_hidden(kind, window):
    mask = random_mask(50, 70, causal=kind[0], vectors=kind[1], batch=2, heads=3)
    ordered, order = mask.sort_columns(window)
    hidden = hidden_by_definition(mask.bounds, mask.causal, 50)
    moved = hidden.gather(-1, order.unsqueeze(2).expand_as(hidden))
    assert torch.equal(hidden_by_definition(ordered.bounds, ordered.causal, 50), moved)
    assert torch.equal(order.sort(-1).values, torch.arange(70).expand_as(order))
    window = window or 128
    assert torch.equal(order // window, (torch.arange(70) // window).expand_as(order))
    rows = torch.arange(1, 51)[:, None]
    until = torch.where(moved, 0, rows).amax(2)  # the last row that sees a column, and 1
    for part in until.split(window, dim=-1):
        assert (part.diff() >= 0).all()


def test_columns_that_are_hidden_alike_stay():
    mask = masks.causal_document(lengths=[100, 200, 50])
    _, order = mask.sort_columns()
    assert torch.equal(order, torch.arange(350).expand(1, 1, 350))


def test_the_triangle_as_a_bound_of_its_own():
    for vectors in (1, 2):
        mask = random_mask(30, 50, causal=True, vectors=vectors)
        explicit = ColumnMask(mask.bounds_without_causal(), causal=False, q_len=30)
        assert torch.equal(explicit.to_dense(), mask.to_dense())
    mask = masks.document(lengths=[10, 20])
    assert mask.bounds_without_causal() is mask.bounds


@pytest.mark.parametrize("n", [8192, 32768])
def test_a_random_eviction_hides_tiles(n):
    """As docs/performance.md has it."""
    mask = kernel_masks.build("random_eviction", n).mask
    before, after = ([int((m.tile_map() >= state).sum()) for state in (1, 2)] for m in (mask, mask.sort_columns()[0]))
    assert after[0] < 0.88 * before[0]
    assert after[1] > 2.5 * before[1]
    row = f"| {n // 1024}K | {before[0]}, {before[1]} | {after[0]}, {after[1]} |"
    assert row in (Path(__file__).parents[2] / "docs/performance.md").read_text()


def test_no_other_mask_of_the_benchmark_hides_more():
    for name in kernel_masks.MASKS:
        mask = kernel_masks.build(name, 8192).mask
        before, after = (int((m.tile_map() > 0).sum()) for m in (mask, mask.sort_columns()[0]))
        assert name == "random_eviction" or before <= after <= 1.02 * before
