"""The Hopper kernels on a Hopper GPU, against dense attention in float64 and against themselves.

What does not depend on the kernels (plans, captured graphs, models) is tested in ``test_triton.py``.
"""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashmask import ColumnMask, flashmask_attention, masks
from hf_flashmask.attention.backends import HOPPER_AUTO_LENGTH, HOPPER_FORWARD_LENGTH, choose, choose_backward
from tests.attention.test_oracle import built
from tests.attention.triton_checks import ARBITRARY_GRAD_TOLERANCE, KINDS, arbitrary, compare, document, poison
from tests.attention.triton_checks import qkv as any_qkv
from tests.helpers import random_mask

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)

BF16 = torch.bfloat16
qkv = functools.partial(any_qkv, grad=False)


def check(mask, **options):
    with pytest.MonkeyPatch.context() as patch:
        poison(patch)
        compare(mask, **{"dtype": BF16, "d": 64, "dv": 64, "device": "cuda", "backend": "hopper", **options})


def attend(q, k, v, mask, **options):
    return flashmask_attention(q, k, v, mask, backend="hopper", return_lse=True, **options)


@pytest.mark.parametrize("name", list(built(8)))
def test_every_builder(name):
    for n, d in ((61, 64), (500, 128), (300, 256)):
        mask = built(n)[name]
        for part in (mask, mask[:, :, n // 2 :], mask[:, :, :, : 2 * n // 3]):
            check(part, kv_heads=2 if mask.shape[1] == 2 else 4, d=d, dv=d)


VARIANTS = [
    (BF16, 128, 128, {"transposed": True}),
    (BF16, 128, 128, {"softcap": 5.0, "sinks": True, "dlse": True}),
    (BF16, 96, 96, {}),
    (BF16, 72, 80, {"sinks": True}),
    (BF16, 24, 40, {"dlse": True}),
    (torch.float16, 64, 64, {"softcap": 5.0}),
    (torch.float16, 128, 128, {"scale": -0.1}),
    (BF16, 256, 256, {"transposed": True}),
    (BF16, 192, 128, {"dlse": True}),
    (torch.float16, 136, 256, {"softcap": 5.0, "sinks": True}),
]


@pytest.mark.parametrize(("dtype", "d", "dv", "features"), VARIANTS)
def test_dtypes_head_dims_and_features(dtype, d, dv, features):
    for causal, vectors in KINDS:
        mask = random_mask(257, 511, causal=causal, vectors=vectors, batch=2, heads=2)
        check(mask, kv_heads=2, dtype=dtype, d=d, dv=dv, **features)
    check(document(1000), kv_heads=1, dtype=dtype, d=d, dv=dv, **features)


@pytest.mark.parametrize("n", [1, 2, 15, 63, 64, 65, 127, 128, 129, 191, 257, 383, 511, 640, 1001, 2113, 4097])
def test_lengths(n):
    for d in (64, 128, 256):
        check(document(n), batch=1, kv_heads=2, d=d, dv=d)
        check(document(n)[:, :, n - max(1, n // 3) :], batch=2, kv_heads=1, d=d, dv=d)


def test_sorted_keys():
    """Other sizes than multiples of a window, an order a batch row and key head, and out of a view that TMA reads."""
    for d in (64, 128):
        check(masks.random_eviction(1300, num_heads=2, batch_size=2), kv_heads=2, d=d, dv=d, sort_keys=True)
        check(masks.random_eviction(2100), batch=1, kv_heads=1, d=d, dv=d, sort_keys=True, transposed=True)


def test_masks_a_head():
    for (causal, vectors), heads in zip(KINDS, (4, 2, 4, 2), strict=True):
        check(random_mask(200, 330, causal=causal, vectors=vectors, batch=2, heads=heads), kv_heads=2)
        check(random_mask(200, 330, causal=causal, vectors=vectors, heads=heads), kv_heads=2, batch=3)


def test_more_work_than_multiprocessors():
    """A program takes piece after piece, of several rows of the batch and heads."""
    for d in (64, 128, 256):
        check(document(1001), heads=32, kv_heads=8, batch=3, d=d, dv=d)


def test_rows_and_columns_that_see_nothing():
    mask = masks.document(lengths=[500])
    bounds = mask.bounds.clone()
    bounds[..., 1, :] = 300  # rows before 300 are hidden everywhere
    bounds[..., 0, 128:256] = 0  # and these columns from all
    for d in (64, 128, 256):
        check(ColumnMask(bounds, causal=False), d=d, dv=d)
    everything = ColumnMask(torch.zeros(1, 1, 1, 500, dtype=torch.int32), causal=True)
    out, lse = attend(*qkv(everything), everything.to("cuda"))
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_bounds_of_any_value():
    lowest, highest = -(2**31), 2**31 - 1
    values = torch.tensor([lowest, -1, 0, 77, 300, highest], dtype=torch.int32)
    for causal, vectors in KINDS:
        index = torch.randint(0, 6, (1, 1, vectors, 300), generator=torch.Generator().manual_seed(0))
        check(ColumnMask(values[index], causal=causal))


def test_hidden_tiles_are_not_read():
    mask = masks.causal_document(lengths=[256, 300]).to("cuda")
    q, k, v = qkv(mask)
    expected = attend(q, k, v, mask)
    k[:, :256], v[:, :256] = torch.nan, torch.nan
    out, lse = attend(q, k, v, mask)
    assert torch.equal(out[:, 256:], expected[0][:, 256:])
    assert torch.equal(lse[..., 256:], expected[1][..., 256:])


@settings(max_examples=100, deadline=None)
@given(arbitrary(longest=900), st.sampled_from([64, 128, 256]))
def test_random_bounds(case, d):
    mask, options = case
    check(mask, d=d, dv=d, grad_tol=ARBITRARY_GRAD_TOLERANCE, **options)


def grads(tensors, mask, do=None, **options):
    """out, lse, dq, dk, dv."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    out, lse = attend(*tensors, mask, **options)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, tensors, torch.ones_like(out) if do is None else do)


def same(first, again):
    """The same bits, but for dq, which is added up in any order."""
    dq, expected = again[2].float(), first[2].float()
    assert (dq - expected).norm() <= 1e-3 * expected.norm() + 1e-6
    return all(torch.equal(a, b) for i, (a, b) in enumerate(zip(first, again, strict=True)) if i != 2)


def test_races():
    """Hundreds of launches over random masks and lengths, each three times: the same bits, whatever the timing."""
    generator = torch.Generator().manual_seed(0)
    for i in range(200):
        n = int(torch.randint(1, 3000, (), generator=generator))
        causal, vectors = KINDS[i % 4]
        mask = random_mask(n, n, causal=causal, vectors=vectors, generator=generator)
        together = (1, 64, 300)[i // 3 % 3]
        bounds = mask.bounds[..., torch.arange(n) // together * together].contiguous()
        mask = ColumnMask(bounds, causal=causal, q_len=n).to("cuda")
        tensors = qkv(mask, 16, 4, (64, 128, 256)[i % 3], batch=2)
        do = torch.randn_like(tensors[0])
        first = grads(tensors, mask, do)
        assert all(t.isnan().sum() == 0 for t in first)
        for _ in range(2):
            assert same(first, grads(tensors, mask, do))


@pytest.mark.parametrize("d", [64, 128, 256])
def test_the_same_bits_every_time(d):
    """Of out, lse, dk and dv; of dq where they are asked for."""
    mask = document(1500).to("cuda")
    tensors = qkv(mask, d=d)
    first, exact = grads(tensors, mask), grads(tensors, mask, deterministic=True)
    for _ in range(20):
        # A new mask, so lists are made anew.
        assert same(first, grads(tensors, mask.clone()))
        again = grads(tensors, mask.clone(), deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(exact, again, strict=True))


def test_torchs_switch_for_determinism(monkeypatch):
    """The fused backward, which adds up dq in any order, is not launched then."""
    from hf_flashmask.attention.hopper import launch

    mask = document(300).to("cuda")
    monkeypatch.setattr(launch, "backward_kernel", None)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    grads(qkv(mask), mask)


def test_gradients_of_out_in_any_strides():
    mask = document(500).to("cuda")
    tensors = qkv(mask)
    ones = torch.ones(1, 500, 4, 64, dtype=BF16, device="cuda")
    expected = grads(tensors, mask, ones)
    assert same(expected, grads(tensors, mask, ones[:, :1, :1, :1].expand_as(ones)))
    assert same(expected, grads(tensors, mask, torch.nn.functional.pad(ones, (0, 1))[..., :64]))


def test_graphs_replay():
    mask = document(1000).to("cuda")
    tensors = qkv(mask)
    grads(tensors, mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = grads(tensors, mask)
    for _ in range(3):
        for t in tensors:
            t.normal_()
        graph.replay()
        assert same(grads(tensors, mask), captured)


def test_lengths_and_heads_compile_nothing_new():
    from hf_flashmask.attention.hopper import launch

    kernels = [launch.forward_kernel, launch.prepare_kernel, launch.backward_kernel, launch.finish_kernel]

    def run(n, batch=1, heads=4, kv_heads=2):
        mask = document(n).to("cuda")
        grads(qkv(mask, heads, kv_heads, batch=batch), mask)
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    before = run(200)
    assert all(before)
    for case in ((1,), (2,), (128,), (1000,), (160, 1, 1, 1), (160, 2, 16, 16), (160, 3, 3, 1)):
        assert run(*case) == before


def test_refusals():
    mask = document(300).to("cuda")
    q, k, v = qkv(mask)
    with pytest.raises(NotImplementedError, match="backend='hopper' serves float16 and bfloat16, got torch.float32"):
        attend(q.float(), k.float(), v.float(), mask)
    with pytest.raises(NotImplementedError, match="backend='hopper' needs k aligned to 16 bytes.*k.contiguous"):
        attend(q, k[:, :, :1].expand(k.shape), v, mask)
    with pytest.raises(NotImplementedError, match="multiples of 8 up to 256, got 264 and 264"):
        attend(*qkv(mask, d=264), mask)


def test_auto_takes_them_where_they_are_faster():
    for n, d, forward, backward in (
        (HOPPER_AUTO_LENGTH, 128, "hopper", "hopper"),
        (HOPPER_AUTO_LENGTH, 256, "hopper", "hopper"),
        (HOPPER_AUTO_LENGTH, 64, "triton", "hopper"),
        (HOPPER_FORWARD_LENGTH[64], 64, "hopper", "hopper"),
        (300, 128, "triton", "triton"),
        (300, 64, "triton", "triton"),
    ):
        q, k, v = qkv(document(n), heads=2, d=d)
        assert choose("auto", q, k, v) == forward
        assert choose_backward("auto", q, k, v, deterministic=False) == backward
        assert choose_backward("auto", q, k, v, deterministic=True) == "triton"
        assert choose("hopper", q, k, v) == choose_backward("hopper", q, k, v, deterministic=False) == "hopper"
        assert choose_backward("triton", q, k, v, deterministic=False) == "triton"
        k = k[:, :, :1].expand(k.shape)
        assert choose("auto", q, k, v) == choose_backward("auto", q, k, v, deterministic=False) == "triton"
