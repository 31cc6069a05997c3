import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashmask import ColumnMask, masks
from tests.helpers import hidden_by_definition, random_mask

FORMS = [(True, 1), (True, 2), (False, 2), (False, 4)]


@st.composite
def column_masks(draw, max_len=12):
    causal, vectors = draw(st.sampled_from(FORMS))
    q_len, kv_len = draw(st.integers(1, max_len)), draw(st.integers(1, max_len))
    batch, heads = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    value = st.integers(-3, q_len + 3)
    n = batch * heads * vectors * kv_len
    values = draw(st.lists(value, min_size=n, max_size=n))
    bounds = torch.tensor(values, dtype=torch.int32).view(batch, heads, vectors, kv_len)
    return ColumnMask(bounds, causal=causal, q_len=q_len)


@settings(max_examples=500, deadline=None)
@given(column_masks())
def test_dense_is_the_definition_and_round_trips(mask):
    dense = mask.to_dense()
    assert torch.equal(dense, ~hidden_by_definition(mask.bounds, mask.causal, mask.q_len))
    again = ColumnMask.from_dense(dense)
    assert torch.equal(again.to_dense(), dense)
    assert again.bounds.shape[2] <= mask.bounds.shape[2]
    additive = torch.where(dense, 0.0, torch.finfo(torch.float32).min)
    assert torch.equal(ColumnMask.from_dense(additive).bounds, again.bounds)
    assert mask.visible_pairs() == int(dense.sum())
    idx = mask.startend_row_indices
    there_and_back = ColumnMask.from_startend_row_indices(idx, causal=mask.causal, q_len=mask.q_len)
    assert torch.equal(there_and_back.bounds, mask.bounds)


@settings(max_examples=200, deadline=None)
@given(column_masks(), st.data())
def test_slices_are_the_dense_slices(mask, data):
    _, _, q_len, kv_len = mask.shape
    a = data.draw(st.integers(0, q_len - 1))
    b = data.draw(st.integers(a + 1, q_len))
    c = data.draw(st.integers(0, kv_len - 1))
    d = data.draw(st.integers(c + 1, kv_len))
    assert torch.equal(mask[:, :, a:b, c:d].to_dense(), mask.to_dense()[:, :, a:b, c:d])
    assert torch.equal(mask[..., c:d].to_dense(), mask.to_dense()[..., c:d])
    assert torch.equal(mask[-1:, :, -(b - a) :].to_dense(), mask.to_dense()[-1:, :, -(b - a) :])


@settings(max_examples=100, deadline=None)
@given(column_masks(), st.integers(1, 5), st.integers(1, 5))
def test_tile_map_is_the_dense_tiles(mask, block_m, block_n):
    tiles = mask.tile_map(block_m, block_n)
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in tiles.shape)).view(-1, 4).tolist():
        tile = mask.to_dense()[b, h, i * block_m : (i + 1) * block_m, j * block_n : (j + 1) * block_n]
        assert int(tiles[b, h, i, j]) == int(tile.any()) + int(tile.all())


def test_and_is_visible_in_both():
    window, documents = masks.sliding_window(20, 4), masks.document(lengths=[7, 6, 7])
    assert torch.equal((window & documents).to_dense(), window.to_dense() & documents.to_dense())
    with pytest.raises(ValueError, match="different sizes"):
        window & masks.causal(21)


def test_three_intervals_name_the_place():
    dense = torch.ones(2, 3, 12, 4, dtype=torch.bool)
    for first, last in ((1, 2), (4, 6), (9, 12)):
        dense[1, 2, first:last, 3] = False
    for mask in (dense, torch.where(dense, 0.0, -torch.inf)):
        with pytest.raises(ValueError, match=r"batch 1, head 2, key column 3 hides 3 .*\[1, 2\), \[4, 6\), \[9, 12\)"):
            ColumnMask.from_dense(mask)
    # The first by number, though another column has its third interval earlier, many blocks of rows before.
    dense = torch.ones(1, 1, 3000, 2000, dtype=torch.bool)
    dense[0, 0, 1:6:2, 1999] = False
    dense[0, 0, 2990:2995:2, 5] = False
    with pytest.raises(ValueError, match=r"key column 5 hides 3 .*\[2990, 2991\), \[2992, 2993\), \[2994, 2995\)"):
        ColumnMask.from_dense(dense)
    start = torch.tensor([0, 4, 8]).view(1, 1, 3, 1)
    with pytest.raises(ValueError, match=r"batch 0, head 0, key column 0 hides 3 .*\[0, 2\), \[4, 6\), \[8, 10\)"):
        ColumnMask.from_masked_intervals(start, start + 2, q_len=12)


@pytest.mark.parametrize(
    ("mask", "causal", "vectors"),
    [
        (masks.causal(9), True, 1),
        (masks.causal_document(lengths=[4, 5]), True, 1),
        (masks.document(lengths=[4, 5]), False, 2),
        (masks.full(9, q_len=4), False, 2),
        (masks.qk_sparse(lengths=[3, 3, 3], dropped=[0, 1, 0]), False, 2),
        (masks.causal_blockwise(lengths=[3, 3, 3]), True, 2),
        (masks.global_sliding_window(12, 2, 2), False, 4),
    ],
)
def test_from_dense_takes_the_fewest_vectors(mask, causal, vectors):
    again = ColumnMask.from_dense(mask.to_dense())
    assert (again.causal, again.bounds.shape[2]) == (causal, vectors)
    assert torch.equal(again.to_dense(), mask.to_dense())


def test_from_dense_makes_nothing_larger_than_its_input():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    self.size = max(self.size, t.untyped_storage().nbytes())
            return out

    dense = torch.where(masks.causal_document(lengths=[3000, 1096]).to_dense(), 0.0, -torch.inf)
    with Largest() as largest:
        ColumnMask.from_dense(dense)
    assert largest.size <= dense.untyped_storage().nbytes()


@pytest.mark.parametrize("autocast", [False, True])
def test_from_dense_under_autocast_and_in_half_precision(autocast):
    mask = masks.causal_document(lengths=[5, 6])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        dense = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask.to_dense(), torch.finfo(dtype).min)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert torch.equal(ColumnMask.from_dense(dense).to_dense(), mask.to_dense())


def test_from_dense_refuses_a_bias_that_is_learned():
    bias = torch.zeros(1, 1, 3, 3, requires_grad=True)
    with pytest.raises(NotImplementedError, match="mask requires grad"):
        ColumnMask.from_dense(bias)
    with torch.no_grad():
        assert ColumnMask.from_dense(bias).to_dense().all()


def test_expanded_dense_masks_stay_small():
    dense = masks.causal(8).to_dense().expand(16, 4, -1, -1)
    assert ColumnMask.from_dense(dense).shape == (1, 1, 8, 8)


def test_is_an_opaque_carrier():
    mask = random_mask(6, 9, causal=True, vectors=2, batch=2, heads=3)
    assert mask.shape == (2, 3, 6, 9)
    assert (mask.ndim, mask.dim(), mask.size(-1), mask.device.type) == (4, 4, 9, "cpu")
    assert mask.to("cpu") is mask
    assert mask.to(torch.float16) is mask
    assert mask.contiguous() is mask
    for other in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), mask.clone()):
        assert torch.equal(other.to_dense(), mask.to_dense())
        assert other.shape == mask.shape
    assert "LTS, LTE; B=2, Hm=3, Sq=6, Sk=9" in repr(mask)
    moved = mask.to("meta")
    assert moved.device.type == "meta"
    with pytest.raises(AttributeError):
        mask.causal = False
    with pytest.raises(NotImplementedError, match="slices of step 1"):
        mask[0]


def test_intervals_computed_in_inference_mode_serve_a_backward():
    mask = masks.causal(4)
    with torch.inference_mode():
        mask.masked_intervals()
    assert not mask.masked_intervals()[0].is_inference()


def test_slices_of_bounds_far_out_of_range():
    low, high = torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max
    for value, visible in ((low, 0), (high, 8)):
        mask = ColumnMask(torch.full((1, 1, 2, 8), value, dtype=torch.int32), causal=False)
        mask.bounds[:, :, 1] = 0
        assert int(mask[:, :, 7:].to_dense().sum()) == visible
        assert int(mask[:, :, 1:].to_dense().sum()) == 7 * visible


def test_bounds_that_are_written_to_are_read_again():
    mask = masks.causal(8)
    assert mask.full_prefix == 1
    assert mask.to_dense().any()
    moved = mask.to("meta")
    mask.bounds.zero_()
    assert not mask.to_dense().any()
    assert mask.full_prefix == 0
    assert mask.to("meta") is not moved


def test_masks_that_do_not_fit_together():
    for one, other, message in (
        (masks.random_eviction(8, num_heads=2), masks.random_eviction(8, num_heads=4), r"\(1, 2\) and \(1, 4\)"),
        (masks.causal(8), masks.causal(8).to("meta"), "masks on cpu and meta"),
        (masks.causal(8), masks.causal(9), "different sizes"),
    ):
        with pytest.raises(ValueError, match=message):
            one & other


def test_density_of_a_million_tokens():
    n = 1 << 20
    mask = masks.causal_document(lengths=[n // 4] * 4)
    assert mask.density() == pytest.approx((n // 4 + 1) / 2 / n, rel=1e-9)


def test_the_known_prefix_is_visible_stays_with_moves_and_is_not_inherited():
    for mask, known in ((masks.full(9, q_len=3), 9), (masks.causal(9, q_len=3), 7), (masks.causal(3, q_len=9), 0)):
        assert mask.full_prefix == known
        assert mask.to_dense()[..., :known].all()
        assert (mask & mask).full_prefix == mask[:, :, :, :3].full_prefix == 0
        assert mask.to("meta").full_prefix == known
    for wrong in (-1, 10, True, torch.tensor(3)):
        with pytest.raises(ValueError, match="full_prefix must be an int from 0 to the 9 columns"):
            masks.full(9).full_prefix = wrong
