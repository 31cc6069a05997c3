"""The lists say of every tile what tile_map says, and each line's tiles are there once."""

import pytest
import torch

from hf_flashmask import ColumnMask, masks
from hf_flashmask.attention.triton import plan
from tests.attention.test_oracle import built
from tests.attention.triton_checks import check_plan, expected_states
from tests.helpers import hidden_by_definition, random_mask

KINDS = [(True, 1), (True, 2), (False, 2), (False, 4)]


def smooth(q_len, kv_len, *, causal, vectors, **shape):
    """Random bounds that neighbours share: whole tiles are hidden or full, as they seldom are else."""
    rough = random_mask(q_len, (kv_len + 22) // 23, causal=causal, vectors=vectors, **shape)
    bounds = rough.bounds.repeat_interleave(23, 3)[..., :kv_len]
    return ColumnMask(bounds.contiguous(), causal=causal, q_len=q_len)


def of_tiles(rows, columns, q_len):
    """A mask of 16 x 16 tiles: ``columns`` of them, where the tiles of rows in ``rows`` [first, last) are hidden."""
    bounds = torch.tensor([[x * 16 for pair in rows for x in pair]], dtype=torch.int32)
    return ColumnMask(bounds[..., None].expand(1, 1, 4, columns * 16).contiguous(), causal=False, q_len=q_len)


@pytest.mark.parametrize("name", list(built(8)))
def test_every_builder(name):
    # One head of its own is as good as four.
    check_plan(built(75)[name][:2, :1], 16, 32)


@pytest.mark.parametrize(("causal", "vectors"), KINDS)
@pytest.mark.parametrize("make", [random_mask, smooth])
def test_random_bounds(make, causal, vectors):
    for q_len, kv_len, block_m, block_n, shape in (
        (50, 70, 32, 16, {}), (97, 33, 16, 32, {"batch": 2}), (1, 20, 16, 16, {}), (64, 1, 16, 16, {}),
    ):  # fmt: skip
        check_plan(make(q_len, kv_len, causal=causal, vectors=vectors, **shape), block_m, block_n)


def test_masks_of_batch_and_heads_are_in_their_places():
    check_plan(random_mask(40, 40, causal=True, vectors=2, batch=2, heads=3), 16, 32)


def test_lines_with_more_spans_than_fit_are_one_span(monkeypatch):
    """Rows and columns of hidden, partial and full tiles in turn: three spans of each kind, with gaps between."""
    state = torch.tensor([0, 1, 0, 2, 1, 0, 2, 0, 1, 2, 0]).repeat_interleave(16)
    end = torch.where(state == 0, 48, torch.where(state == 1, torch.arange(176) % 48, 0))
    mask = ColumnMask(torch.stack((torch.full_like(end, 48), end))[None, None].int(), causal=False, q_len=48)
    assert check_plan(mask, 16, 16) == 0
    for most in (1, 2):
        monkeypatch.setattr(plan, "MAX_SPANS", most)
        assert check_plan(mask, 16, 16) == 3
    monkeypatch.setattr(plan, "MAX_SPANS", 1)
    assert check_plan(of_tiles([(1, 2), (3, 4)], 2, 80), 16, 16) == 2


@pytest.mark.parametrize("n", [32, 33, 70])
def test_more_tiles_than_one_step_looks_at(n, monkeypatch):
    """Columns of ``n`` tiles, of which a step looks at 32."""
    monkeypatch.setattr(plan, "_CHUNK", 64)
    monkeypatch.setattr(plan, "_COMPARED", 16)
    for mask in (
        random_mask(16 * n - 3, 30, causal=False, vectors=4),
        smooth(16 * n, 32, causal=True, vectors=2),
        masks.causal(40, q_len=16 * n - 7),
        masks.full(40, q_len=16 * n),
    ):
        check_plan(mask, 16, 16)


@pytest.mark.parametrize("last", [32, 33, 64, 96])
def test_long_spans_of_lines_that_do_not_fit(last, monkeypatch):
    """Steps in which nothing changes are not looked at closely; they count all the same."""
    monkeypatch.setattr(plan, "_CHUNK", 64)
    monkeypatch.setattr(plan, "MAX_SPANS", 1)
    assert check_plan(of_tiles([(1, 2), (last, 96)], 1, 96 * 16), 16, 16) == 1


def test_rows_of_more_tiles_than_one_step_looks_at(monkeypatch):
    monkeypatch.setattr(plan, "_CHUNK", 64)
    check_plan(smooth(20, 16 * 65 - 5, causal=False, vectors=2), 16, 16)


def test_bounds_that_are_views():
    mask = random_mask(40, 50, causal=True, vectors=2)
    view = ColumnMask(mask.bounds.transpose(2, 3).contiguous().transpose(2, 3), causal=True, q_len=40)
    assert not view.bounds.is_contiguous()
    check_plan(view, 16, 16)


@pytest.mark.parametrize(("causal", "vectors"), KINDS)
def test_columns_added_to_the_bounds_hide_all(causal, vectors):
    mask = random_mask(30, 33, causal=causal, vectors=vectors, batch=2, heads=2)
    padded = plan.pad_bounds(mask, 32).view(2, 2, vectors, 64)
    assert padded.dtype == torch.int32
    assert torch.equal(padded[..., :33], mask.bounds)
    assert hidden_by_definition(padded, causal, 30)[..., 33:].all()


def test_too_many_tiles_are_refused():
    bounds = torch.zeros(1, 1, 2, 1, dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="65536 x 1 tiles of 16 x 16; at most 65534 a side"):
        plan.build(ColumnMask(bounds, causal=False, q_len=2**20), 16, 16, by_columns=True)


def test_what_the_checks_expect():
    """The checks themselves: a document mask's tiles, written down."""
    states = expected_states(masks.causal_document(lengths=[32, 20]), 16, 16)
    assert states[0].tolist() == [[1, 0, 0, 0], [2, 1, 0, 0], [0, 0, 1, 0], [0, 0, 2, 1]]
