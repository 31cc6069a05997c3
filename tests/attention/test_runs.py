"""The host plan covers exactly what is visible, skips what is not, and is made once."""

import pytest
import torch

from hf_flashmask import masks
from hf_flashmask.attention.runs import Kind, cached_plan, plan_runs
from tests.helpers import random_mask


def examples():
    lengths = [300, 5, 1, 194, 500]
    return {
        "causal": masks.causal(1000),
        "causal, bottom right": masks.causal(1000, q_len=300),
        "causal, more rows": masks.causal(300, q_len=1000),
        "full": masks.full(700, q_len=300),
        "causal_document": masks.causal_document(lengths=lengths),
        "document": masks.document(lengths=lengths),
        "sliding_window": masks.sliding_window(1000, 200),
        "global_sliding_window": masks.global_sliding_window(1000, 16, 90),
        "share_question": masks.share_question([[300, 100, 100], [200, 150, 150]]),
        "random_eviction": masks.random_eviction(1000),
        "hash_sparse": masks.hash_sparse(torch.randint(0, 8, (1000,)), torch.randint(0, 8, (1000,))),
        "random": random_mask(500, 700, causal=False, vectors=4, batch=2, heads=2),
    }


@pytest.mark.parametrize("squares", [True, False])
@pytest.mark.parametrize("name", list(examples()))
def test_runs_cover_the_visible_and_nothing_twice(name, squares):
    mask = examples()[name]
    dense = mask.to_dense()
    plan = plan_runs(mask, 128, 256, squares=squares)
    for b in range(mask.shape[0]):
        for h in range(mask.shape[1]):
            seen = torch.zeros(mask.q_len, mask.kv_len, dtype=torch.int32)
            for block in plan.blocks[b][h]:
                for run in block.runs:
                    tile = dense[b, h, block.first : block.last, run.first : run.last]
                    seen[block.first : block.last, run.first : run.last] += 1
                    assert run.last - run.first <= 256
                    assert block.last - block.first <= (256 if squares else 128)
                    if run.kind == Kind.FULL:
                        assert tile.all()
                    elif run.kind == Kind.CAUSAL:
                        assert squares
                        assert torch.equal(tile, torch.ones_like(tile).tril())
                    else:
                        assert block.last - block.first <= 128
            assert int(seen.max()) <= 1
            assert not (dense[b, h] & (seen == 0)).any()


def test_documents_are_one_causal_square_each():
    plan = plan_runs(masks.causal_document(lengths=[300, 200, 500]), 128, 512, squares=True)
    (blocks,) = plan.blocks[0]
    assert [(b.first, b.last, b.runs) for b in blocks] == [
        (a, b, ((a, b, Kind.CAUSAL),)) for a, b in ((0, 300), (300, 500), (500, 1000))
    ]


@pytest.mark.parametrize(
    ("name", "most"),
    [("causal_document", 1.3), ("sliding_window", 1.6), ("global_sliding_window", 1.7), ("share_question", 1.2)],
)
def test_little_that_is_hidden_is_visited(name, most):
    mask = examples()[name]
    area = sum(
        (block.last - block.first) * (run.last - run.first) * (0.5 if run.kind == Kind.CAUSAL else 1.0)
        for block in plan_runs(mask, 128, 256, squares=True).blocks[0][0]
        for run in block.runs
    )
    assert area / mask.visible_pairs() < most


def test_long_documents_are_cut_into_full_runs_and_squares():
    (blocks,) = plan_runs(masks.causal_document(lengths=[300, 100]), 64, 200, squares=True).blocks[0]
    assert [(b.first, b.last, b.runs) for b in blocks] == [
        (0, 150, ((0, 150, Kind.CAUSAL),)),
        (150, 300, ((0, 150, Kind.FULL), (150, 300, Kind.CAUSAL))),
        (300, 400, ((300, 400, Kind.CAUSAL),)),
    ]


def test_made_once_for_all_layers_and_forgotten_with_the_mask():
    mask = masks.causal(64)
    first = cached_plan(mask, 32, 32, squares=True)
    again = type(mask)(mask.bounds, causal=True)
    assert cached_plan(again, 32, 32, squares=True) is first
    assert cached_plan(mask, 16, 32, squares=True) is not first
    mask.bounds.fill_(3)  # against the rules, but not silently wrong
    assert cached_plan(type(mask)(mask.bounds, causal=True), 32, 32, squares=True) is not first
