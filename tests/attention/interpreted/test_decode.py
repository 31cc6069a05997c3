"""The kernels for few queries in the interpreter, against dense attention in float64: every branch that they have."""

import pytest
import torch

from hf_flashmask import ColumnMask, flashmask_attention, masks
from hf_flashmask.attention import paged
from hf_flashmask.attention.triton import decode_launch
from tests.attention.triton_checks import KINDS, compare
from tests.helpers import random_mask


@pytest.fixture(autouse=True)
def _small(kernels, monkeypatch):
    """Blocks of 16 rows and 16 keys, two looked at together, so that few keys make several splits of several looks."""
    monkeypatch.setattr(decode_launch, "BLOCKS", 2)
    monkeypatch.setattr(decode_launch, "_COMBINED", (2,))
    monkeypatch.setattr(decode_launch, "_LEAST_BLOCKS", 2)
    monkeypatch.setattr(decode_launch, "multiprocessors", lambda device: 8)
    decode_launch._launch.cache_clear()
    yield
    decode_launch._launch.cache_clear()


def tree():
    """Drafted tokens behind a prefix that all see: each sees its ancestors."""
    ends = torch.full((70,), 8)
    ends[-8:] = torch.tensor([8, 5, 3, 4, 5, 8, 7, 8])
    return ColumnMask(ends.view(1, 1, 1, -1).int(), causal=True, q_len=8)


# What it is about: (mask, shapes and features).
CASES = {
    "one query": (lambda: masks.causal(71, q_len=1), {"kv_heads": 2}),
    "one query of one head, one key": (lambda: masks.full(1, q_len=1), {"heads": 1, "kv_heads": 1, "batch": 1}),
    "a tree, more rows than a tile": (tree, {"heads": 8, "kv_heads": 2, "batch": 1, "d": 24, "sinks": True}),
    "sixteen queries, more than keys": (lambda: masks.causal(9, q_len=16), {"kv_heads": 1, "softcap": 5.0}),
    "two bounds, causal, a mask a head": (
        lambda: random_mask(3, 50, causal=True, vectors=2, batch=2, heads=4), {"kv_heads": 2, "dv": 40}
    ),
    "two bounds, a mask a key head": (
        lambda: random_mask(5, 70, causal=False, vectors=2, heads=2), {"kv_heads": 2, "sinks": True, "softcap": 5.0}
    ),
    "four bounds, a mask a batch row": (
        lambda: random_mask(2, 50, causal=False, vectors=4, batch=2), {"heads": 6, "kv_heads": 2, "d": 40, "dv": 8}
    ),
    "nothing is visible": (lambda: ColumnMask(torch.zeros(1, 1, 1, 40).int(), causal=True, q_len=2), {}),
    "nothing but sinks": (lambda: ColumnMask(torch.zeros(1, 1, 1, 40).int(), causal=True, q_len=2), {"sinks": True}),
    "negative scale": (tree, {"kv_heads": 2, "batch": 1, "scale": -0.3}),
    "float16": (tree, {"kv_heads": 2, "batch": 1, "dtype": torch.float16, "transposed": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_against_dense_attention(name):
    mask, features = CASES[name]
    compare(mask(), gradients=False, **features)


def attend(q, k, v, mask):
    return flashmask_attention(q, k, v, mask, backend="triton", return_lse=True)


@pytest.mark.parametrize(("causal", "vectors"), KINDS)
def test_blocks_of_every_state(causal, vectors):
    """Keys of a block share their bounds: hidden blocks, which are NaN, partial and full ones."""
    q_len, block, blocks = 4, 16, 24
    rough = random_mask(q_len, blocks, causal=causal, vectors=vectors)
    mask = ColumnMask(rough.bounds.repeat_interleave(block, 3), causal=causal, q_len=q_len)
    seen = mask.to_dense()[0, 0].unflatten(1, (blocks, block)).transpose(0, 1).flatten(1)  # by block
    states = {(bool(part.any()), bool(part.all())) for part in seen}
    assert states == {(False, False), (True, False), (True, True)}
    q, k, v = (torch.randn(1, n, h, 16) for n, h in ((q_len, 2), (blocks * block, 1), (blocks * block, 1)))
    expected = flashmask_attention(q, k, v, mask, backend="reference", return_lse=True)
    hidden = ~seen.any(1).repeat_interleave(block)
    k[:, hidden], v[:, hidden] = torch.nan, torch.nan
    for actual, wanted in zip(attend(q, k, v, mask), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("q_len", [1, 3])
def test_what_is_hidden_is_not_read(q_len):
    """Left padding, what a window has left behind, and the unwritten tail of a static cache, to the key."""
    kv_len, first, last = 150, 32, 77
    visible = torch.zeros(kv_len, dtype=torch.bool)
    visible[first:last] = True
    bounds = torch.stack((visible * q_len, torch.zeros(kv_len))).int()[None, None]
    mask = ColumnMask(bounds, causal=False, q_len=q_len)
    q = torch.randn(1, q_len, 2, 16)
    cache = torch.full((2, 1, 2, 200, 16), torch.nan)  # k and v, [B, H, S, D], longer than what is looked at
    cache[:, :, :, first:last] = torch.randn(2, 1, 2, last - first, 16)
    k, v = (t[:, :, :kv_len].transpose(1, 2) for t in cache)
    out, lse = attend(q, k, v, mask)
    expected = attend(q, k[:, first:last], v[:, first:last], masks.full(last - first, q_len=q_len))
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])


@pytest.mark.parametrize(("causal", "vectors"), KINDS)
@pytest.mark.parametrize("page", [16, 48, 10])  # the last is no multiple of a block: pages are gathered
def test_pages_are_followed(page, causal, vectors, monkeypatch):
    """Rows of different lengths; pages in any order, some shared, unused entries and pages never read."""
    monkeypatch.setattr(paged, "PAGE", 16)
    width, q_len, lengths = 4, 3, torch.tensor([4 * page - 5, 1, 2 * page])
    table = torch.full((3, width), -1, dtype=torch.int32)
    table[0], table[1, 0], table[2, :2] = torch.tensor([7, 2, 9, 4]), 5, torch.tensor([7, 0])
    pages = torch.randn(2, 11, page, 2, 24)
    j = torch.arange(width * page)
    own = ColumnMask(((j < lengths[:, None]) * q_len).int()[:, None, None], causal=True, q_len=q_len)
    mask = own & random_mask(q_len, width * page, causal=causal, vectors=vectors)
    q, sinks = torch.randn(3, q_len, 4, 24), torch.randn(4)
    k, v = (t[table.clamp(min=0)].flatten(1, 2) for t in pages)
    expected = flashmask_attention(q, k, v, mask, sinks=sinks, softcap=5.0, backend="reference")
    if page % 16 == 0:
        pages[:, [1, 3, 6, 8, 10]] = torch.nan
        pages[:, 5, 1:], pages[:, 4, -5:] = torch.nan, torch.nan
    out = paged.paged_attention(q, *pages, table, mask, sinks=sinks, softcap=5.0, backend="triton")
    torch.testing.assert_close(out, expected)


def test_static_caches_are_not_copied(monkeypatch):
    """The kernel gets the very memory of a cache's view, also where the bounds are a slice."""
    seen = {}

    def run(kernel, grid, key, arguments, options):
        seen.update(zip(kernel.arg_names, arguments, strict=False))

    monkeypatch.setattr(decode_launch, "_run", run)
    cache = torch.randn(2, 2, 3, 64, 16)
    k, v = (t[:1, 1:, :40].transpose(1, 2) for t in cache)
    mask = masks.causal(64, q_len=2)[:, :, :, :40]
    attend(torch.randn(1, 2, 4, 16), k, v, mask)
    for name, t in (("k", k), ("v", v), ("bounds", mask.bounds)):
        assert seen[name].data_ptr() == t.data_ptr()
    assert (seen["k_sb"], seen["k_sh"], seen["k_ss"]) == (0, 64 * 16, 16)


@pytest.mark.parametrize(("kv_len", "kernels"), [(9, 1), (300, 2)])  # one split, many
@torch.no_grad()
def test_layers_alike_are_launched_alike(kv_len, kernels, monkeypatch):
    """A call like the one before it hands the kernels what that one did, but for the addresses; others start anew."""
    first, again = [], []
    monkeypatch.setattr(decode_launch, "_run", lambda kernel, *rest: first.append(rest) or kernel)
    monkeypatch.setattr(decode_launch, "_start", lambda kernel, grid, stream, given: again.append((grid, given)))
    monkeypatch.setattr(decode_launch, "_current_stream", lambda: lambda device: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    mask = masks.causal(kv_len, q_len=2)

    def layer(heads=4, skip=0, **options):
        q, k, v = (torch.randn(2, n, h, 16).half() for n, h in ((2, heads), (kv_len, 2), (kv_len, 2)))
        q = torch.cat((q.flatten(), q.flatten()))[skip:][: q.numel()].view(q.shape)
        given = [q, k, v, mask.bounds, mask.bounds, torch.randn(heads)]
        flashmask_attention(q, k, v, mask, sinks=given[-1], backend="triton", **options)
        return [t.data_ptr() for t in given]

    layer()
    assert (len(first), len(again)) == (kernels, 0)
    *inputs, sinks = layer()
    assert (len(first), len(again)) == (kernels, kernels)
    assert list(again[0][1][:5]) == inputs
    for (grid, _, before, *_), (same_grid, after), at in zip(first, again, (8, 3), strict=False):
        assert grid == same_grid
        assert after[at] == sinks
        assert before[at + 1 :] == after[at + 1 :]
    expected = kernels
    for other in ({"skip": 1}, {"heads": 8}, {"softcap": 3.0}, {"softmax_scale": 0.5}):
        layer(**other)
        expected += kernels
        assert len(first) == expected, other


def test_splits_fill_the_device():
    slots = 396
    for programs in (1, 8, 100, 128, 300, 512, 5000):
        for blocks in (1, 3, 31, 33, 100, 5000):
            splits = decode_launch.splits_of(programs, blocks, slots)
            assert 1 <= splits <= blocks
            rounds = programs * splits / slots
            if blocks == 5000:
                assert rounds / -(-rounds // 1) >= 0.8
