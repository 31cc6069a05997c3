"""Sorting columns: the same mask in another order, in which more tiles are hidden or full."""

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


@pytest.mark.parametrize(("n", "visited", "full"), [(8192, 0.88, 2.5), (32768, 0.83, 2.7)])
def test_a_random_eviction_hides_tiles(n, visited, full):
    """The figures of docs/performance.md; forward tiles of 128 x 128."""
    mask = kernel_masks.build("random_eviction", n).mask
    before, after = (m.tile_map() for m in (mask, mask.sort_columns()[0]))
    assert (after > 0).sum() <= visited * (before > 0).sum()
    assert (after == 2).sum() >= full * (before == 2).sum()
