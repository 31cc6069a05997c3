"""The torch backend against dense attention in float64: outputs, lse and the gradient of every input."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_flashmask import ColumnMask, flashmask_attention, masks
from hf_flashmask.attention import torch_blocks
from tests.helpers import hidden_by_definition, random_mask, relative

# The features that change the arithmetic: softcap, sinks, a gradient into lse.
FEATURES = [
    dict(zip(("softcap", "sinks", "dlse"), f, strict=True)) for f in itertools.product((None, 5.0), (0, 1), (0, 1))
]


def built(n):
    """Every builder at n tokens; the last three have bounds of their own a head."""
    cut = [max(1, n // 3), n - max(1, n // 3)] if n > 1 else [1]
    half = [x // 2 for x in cut]
    buckets = torch.randint(0, 4, (2, 1, 4, n))
    return {
        "causal": masks.causal(n),
        "full": masks.full(n),
        "sliding_window": masks.sliding_window(n, max(1, n // 5)),
        "sliding_window, both ways": masks.sliding_window(n, (n // 7, n // 9)),
        "causal_document": masks.causal_document(lengths=cut),
        "document": masks.document(lengths=cut),
        "share_question": masks.share_question([[*half, *(c - h for c, h in zip(cut, half, strict=True))]]),
        "global_sliding_window": masks.global_sliding_window(n, min(3, n), n // 7),
        "causal_blockwise": masks.causal_blockwise(lengths=cut),
        "prefix_lm_causal": masks.prefix_lm_causal(n, n // 2),
        "prefix_lm_document": masks.prefix_lm_document(lengths=cut, prefix_lengths=half),
        "qk_sparse": masks.qk_sparse(lengths=cut, dropped=[k % 2 for k in range(len(cut))]),
        "prefix_tree": masks.prefix_tree(torch.arange(n) % max(1, n // 3)),
        "image_blocks": masks.image_blocks(torch.arange(n) // max(1, n // 4) - 1, window_size=max(1, n // 2)),
        "padding": masks.padding(torch.arange(n)[None] >= torch.tensor([[0], [n // 2]])),
        "hash_sparse a head": masks.hash_sparse(buckets[0].expand(2, 4, n), buckets[1].expand(2, 4, n)),
        "random_eviction a head": masks.random_eviction(n, num_heads=4, batch_size=2),
        "random_eviction a kv head": masks.random_eviction(n, num_heads=2),
    }


def compare(mask, *, heads=4, kv_heads=4, batch=2, d=8, dv=8, softcap=None, sinks=False, dlse=False,
            dtype=torch.float32, tol=1e-5, grad_tol=1e-4, sort_keys=False, scale=None):  # fmt: skip
    q = torch.randn(batch, mask.q_len, heads, d, dtype=dtype)
    k = torch.randn(batch, mask.kv_len, kv_heads, d, dtype=dtype)
    v = torch.randn(batch, mask.kv_len, kv_heads, dv, dtype=dtype)
    inputs = [q, k, v, *([torch.randn(heads, dtype=dtype)] if sinks else [])]
    oracle = [t.double().requires_grad_() for t in inputs]
    inputs = [t.requires_grad_() for t in inputs]
    do = torch.randn(batch, mask.q_len, heads, dv, dtype=torch.float64)
    dl = torch.randn(batch, heads, mask.q_len, dtype=torch.float64)

    def run(tensors, backend):
        out, lse = flashmask_attention(
            *tensors[:3], mask, softcap=softcap, sinks=tensors[3] if sinks else None, return_lse=True, backend=backend,
            sort_keys=sort_keys and backend != "reference", softmax_scale=scale,
        )  # fmt: skip
        loss = (out.double() * do).sum()
        if dlse:
            loss = loss + (lse.masked_fill(lse == -torch.inf, 0.0).double() * dl).sum()
        return out, lse, torch.autograd.grad(loss, tensors)

    out, lse, grads = run(inputs, "torch")
    expected, expected_lse, expected_grads = run(oracle, "reference")
    assert out.dtype == dtype
    assert out.shape == expected.shape
    assert float((out - expected).detach().abs().max()) <= tol
    alive = expected_lse > -torch.inf
    assert torch.equal(lse > -torch.inf, alive)
    assert float((lse - expected_lse).detach()[alive].abs().max() if alive.any() else 0) <= 2 * tol
    for name, grad, wanted in zip(("q", "k", "v", "sinks"), grads, expected_grads, strict=False):
        assert grad.isfinite().all(), name
        assert relative(grad, wanted) <= grad_tol, name


@pytest.mark.parametrize("n", [1, 63, 128, 1000])
@pytest.mark.parametrize("name", list(built(8)))
def test_every_builder(name, n):
    mask = built(n)[name]
    rows, columns = max(1, n // 2), max(1, 2 * n // 3)
    heads = [(4, 4), (4, 2), (4, 1)] if mask.shape[1] == 1 else [(4, 4), (4, 2)] if mask.shape[1] == 4 else [(4, 2)]
    features = itertools.cycle(FEATURES)
    for (hq, hkv), part in itertools.product(heads, (mask, mask[:, :, n - rows :], mask[:, :, :, :columns])):
        # At 1000 tokens, the features in turn; below, all of them.
        for feature in [next(features)] if n == 1000 else FEATURES:
            compare(part, heads=hq, kv_heads=hkv, **feature)


@st.composite
def arbitrary(draw):
    causal, vectors = draw(st.sampled_from([(True, 1), (True, 2), (False, 2), (False, 4)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    q_len, kv_len = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)]))
    batch = draw(st.integers(1, 3))
    mask = random_mask(
        q_len,
        kv_len,
        causal=causal,
        vectors=vectors,
        batch=draw(st.sampled_from([1, batch])),
        heads=draw(st.sampled_from([1, kv_heads, heads])),
        generator=generator,
    )
    return mask, {"heads": heads, "kv_heads": kv_heads, "batch": batch, **draw(st.sampled_from(FEATURES))}


@settings(max_examples=500, deadline=None)
@given(arbitrary())
def test_random_bounds(case):
    mask, options = case
    compare(mask, **options)


@pytest.mark.parametrize(
    ("d", "dv"), [(1, 1), (24, 16), (16, 24), (72, 80), (96, 96), (192, 128), (256, 256), (512, 512)]
)
@pytest.mark.parametrize("feature", [FEATURES[0], FEATURES[-1]])
def test_head_dims(d, dv, feature):
    compare(masks.causal_document(lengths=[50, 21]), d=d, dv=dv, kv_heads=2, **feature)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float64, 1e-12)])
@pytest.mark.parametrize("feature", [FEATURES[0], FEATURES[-1]])
def test_dtypes(dtype, tol, feature):
    for mask in (masks.causal_document(lengths=[150, 121]), masks.sliding_window(600, 40)):
        compare(mask, kv_heads=2, d=64, dv=64, dtype=dtype, tol=2 * tol, grad_tol=tol, **feature)


def test_the_reference_backend_is_softmax_of_the_definition():
    mask = random_mask(9, 12, causal=False, vectors=4, batch=2, heads=2)
    q, k, v = torch.randn(2, 9, 4, 8), torch.randn(2, 12, 2, 8), torch.randn(2, 12, 2, 8)
    sinks = torch.randn(4)
    hidden = hidden_by_definition(mask.bounds, mask.causal, mask.q_len)
    out, lse = flashmask_attention(q, k, v, mask, softcap=3.0, sinks=sinks, return_lse=True, backend="reference")
    for b, h, i in itertools.product(range(2), range(4), range(9)):
        scores = 3.0 * torch.tanh(k[b, :, h // 2] @ q[b, i, h] * 8**-0.5 / 3.0)
        weights = torch.where(hidden[b, h // 2, i], 0.0, scores.exp())
        total = weights.sum() + sinks[h].exp()
        torch.testing.assert_close(out[b, i, h], weights @ v[b, :, h // 2] / total)
        torch.testing.assert_close(lse[b, h, i], total.log())


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_rows_that_see_nothing(backend):
    mask = ColumnMask(torch.tensor([[[[2] * 5, [5] * 5]]], dtype=torch.int32), causal=False)
    q, k, v = (torch.randn(1, 5, 2, 8, requires_grad=True) for _ in range(3))
    out, lse = flashmask_attention(q, k, v, mask, return_lse=True, backend=backend)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert (grad == 0).all()
    sinks = torch.tensor([0.5, -1.0], requires_grad=True)
    out, lse = flashmask_attention(q, k, v, mask, sinks=sinks, return_lse=True, backend=backend)
    assert (out == 0).all()
    assert torch.equal(lse, sinks.view(1, 2, 1).expand_as(lse))


def test_nan_in_hidden_keys_and_unwritten_outputs_do_not_show(monkeypatch):
    """Skipped tiles are not read, and nothing comes from memory that was not written."""
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *a, **k: empty(t, *a, **k).fill_(torch.nan))
    q, k, v = (torch.randn(1, 512, 2, 16) for _ in range(3))
    mask = masks.causal_document(lengths=[256, 256])
    expected = flashmask_attention(q, k, v, mask)
    k[:, :256], v[:, :256] = torch.nan, torch.nan
    out = flashmask_attention(q, k, v, mask)
    assert torch.equal(out[:, 256:], expected[:, 256:])


def test_any_strides_and_no_expanded_keys():
    q = torch.randn(2, 4, 40, 8).transpose(1, 2)
    k, v = (torch.randn(2, 40, 8, 2).transpose(2, 3) for _ in range(2))
    mask = masks.causal(40)
    expected = flashmask_attention(q.contiguous(), k.contiguous(), v.contiguous(), mask)
    torch.testing.assert_close(flashmask_attention(q, k, v, mask), expected)


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_scattered_and_structured_masks_at_length(softcap):
    """Long enough for every kind of run: squares, wide full runs, mixed runs in pieces, gaps."""
    lengths = [700, 31, 1, 400, 268]
    for mask in (
        masks.causal_document(lengths=lengths),
        masks.sliding_window(1400, 300),
        masks.global_sliding_window(1400, 16, 100),
        masks.random_eviction(1400),
        random_mask(1400, 1111, causal=False, vectors=4),
    ):
        compare(mask, heads=2, kv_heads=1, batch=1, softcap=softcap)


def test_large_inputs_are_taken_a_few_heads_at_a_time(monkeypatch):
    monkeypatch.setattr(torch_blocks, "_PART_ELEMENTS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for heads, kv_heads, batch in ((4, 4, 3), (4, 2, 3), (6, 3, 2), (4, 1, 2), (8, 4, 1)):
        compare(masks.causal_document(lengths=[30, 41]), heads=heads, kv_heads=kv_heads, batch=batch)


def test_paddle_indices_and_plain_masks():
    q, k, v = (torch.randn(2, 30, 2, 8) for _ in range(3))
    mask = masks.causal_document(lengths=[10, 20])
    expected = flashmask_attention(q, k, v, mask)
    idx = mask.startend_row_indices
    assert torch.equal(flashmask_attention(q, k, v, startend_row_indices=idx, causal=True), expected)
    assert torch.equal(flashmask_attention(q, k, v, causal=True), flashmask_attention(q, k, v, masks.causal(30)))
    assert torch.equal(flashmask_attention(q, k, v), flashmask_attention(q, k, v, masks.full(30)))
    scaled = flashmask_attention(q, k, v, softmax_scale=0.3)
    torch.testing.assert_close(scaled, flashmask_attention(q * 0.3 * 8**0.5, k, v))
    idx.fill_(30)  # the caller's own, which a mask made from it does not follow
    assert torch.equal(flashmask_attention(q, k, v, mask), expected)


@pytest.mark.parametrize("scale", [-0.4, 0.0])
def test_scales_of_zero_and_less(scale):
    """torch's kernel hides the triangle before it scales: minus infinity times a negative number."""
    for mask, features in itertools.product((masks.causal(70), masks.causal_document(lengths=[30, 41])), FEATURES):
        compare(mask, kv_heads=2, scale=scale, **features)


def test_nothing_that_comes_for_the_lse_of_a_row_that_sees_nothing_counts():
    """A z-loss that leaves such rows out sends NaN there, 0 times infinity."""
    mask = masks.padding(torch.arange(70)[None] >= 9)
    inputs = [torch.randn(1, 70, 2, 8, requires_grad=True) for _ in range(3)]
    found = []
    for backend in ("torch", "reference"):
        out, lse = flashmask_attention(*inputs, mask, return_lse=True, backend=backend)
        loss = out.sum() + torch.where(lse > -torch.inf, lse.square(), 0.0).sum()
        found.append(torch.autograd.grad(loss, inputs))
    for grad, expected in zip(*found, strict=True):
        torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-4)


def test_autocast_does_not_lower_float32_inputs():
    q, k, v = (torch.randn(1, 50, 2, 16, requires_grad=True) for _ in range(3))
    for softcap, backend in ((None, "torch"), (9.0, "torch"), (None, "reference")):
        expected = flashmask_attention(q, k, v, causal=True, softcap=softcap, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            out = flashmask_attention(q, k, v, causal=True, softcap=softcap, backend=backend)
        assert torch.equal(out, expected)


def test_operator_contract():
    """Schema, fake tensors and autograd registration, as torch.library checks them."""
    from hf_flashmask.attention import op

    q, k, v = (torch.randn(1, 9, 2, 8, requires_grad=True) for _ in range(3))
    arguments = (q, k, v, masks.causal(9).bounds, True, 0.3, 0.0, torch.randn(2, requires_grad=True), "torch", False)
    for sort_keys in (False, True):
        torch.library.opcheck(op.attention, (*arguments, sort_keys))


@pytest.mark.parametrize("sort_keys", [False, True])
def test_compiles_without_graph_breaks(sort_keys):
    mask = masks.causal_document(lengths=[10, 20])

    def attend(q, k, v, bounds):
        return flashmask_attention(q, k, v, ColumnMask(bounds, causal=True), sort_keys=sort_keys).square().sum()

    q, k, v = (torch.randn(1, 30, 2, 8, requires_grad=True) for _ in range(3))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(attend(q, k, v, mask.bounds), (q, k, v))
    for grad, wanted in zip(torch.autograd.grad(compiled(q, k, v, mask.bounds), (q, k, v)), expected, strict=True):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("kind", [(True, 1), (True, 2), (False, 2), (False, 4)])
def test_sorted_keys(kind):
    """As without sorting: in windows and less than one, for a mask, one a batch row, and one a key head."""
    for q_len, kv_len, shape in ((90, 300, {}), (200, 150, {"batch": 2}), (40, 70, {"heads": 2}), (1, 200, {})):
        mask = random_mask(q_len, kv_len, causal=kind[0], vectors=kind[1], **shape)
        for features in ({}, {"softcap": 5.0, "sinks": True, "dlse": True}):
            compare(mask, kv_heads=2, sort_keys=True, **features)


def test_an_order_of_keys_is_found_once_a_mask(monkeypatch):
    """By all layers and the backward, until its bounds are written to; and what is saved is what was given."""
    sorted_masks, sort_columns = [], ColumnMask.sort_columns
    monkeypatch.setattr(ColumnMask, "sort_columns", lambda mask: sorted_masks.append(mask) or sort_columns(mask))
    mask = masks.random_eviction(300)
    q, k, v = (torch.randn(1, 300, 2, 8, requires_grad=True) for _ in range(3))
    out = flashmask_attention(flashmask_attention(q, k, v, mask, sort_keys=True), k, v, mask, sort_keys=True)
    assert any(t is k for t in out.grad_fn.saved_tensors)
    out.sum().backward()
    assert len(sorted_masks) == 1
    mask.bounds.copy_(masks.random_eviction(300).bounds)
    out = flashmask_attention(q, k, v, mask, sort_keys=True)
    torch.testing.assert_close(out, flashmask_attention(q, k, v, mask), atol=1e-5, rtol=1e-5)
    assert len(sorted_masks) == 2


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    mask = masks.causal_document(lengths=[10, 20])
    q, k, v = (torch.randn(1, 30, 2, 8, requires_grad=True) for _ in range(3))

    def attend(q, k, v):
        return flashmask_attention(q, k, v, mask).square().sum()

    expected = torch.autograd.grad(attend(q, k, v), (q, k, v))
    for reentrant in (True, False):
        loss = checkpoint(attend, q, k, v, use_reentrant=reentrant)
        grads = [t.grad for t in (q, k, v)]
        assert grads == [None] * 3
        loss.backward()
        for t, wanted in zip((q, k, v), expected, strict=True):
            assert torch.equal(t.grad, wanted)
            t.grad = None


def test_a_sink_without_weight_and_a_row_that_sees_nothing():
    """The sink's gradient is 0 there, not NaN."""
    mask = ColumnMask(torch.tensor([[[[2] * 5, [5] * 5]]], dtype=torch.int32), causal=False)
    sinks = torch.tensor([-torch.inf, 0.3], requires_grad=True)
    q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
    for backend in ("torch", "reference"):
        out = flashmask_attention(q, k, k, mask, sinks=sinks, backend=backend)
        assert out.isfinite().all()
        (grad,) = torch.autograd.grad(out.sum(), sinks)
        assert grad.isfinite().all()
        assert grad[0] == 0


def test_second_derivatives_are_refused():
    q, k, v = (torch.randn(1, 8, 2, 4, requires_grad=True) for _ in range(3))
    out = flashmask_attention(q, k, v, causal=True, backend="torch")
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        dq.sum().backward()
