"""The Triton kernels on a GPU against dense attention in float64, and what only a GPU shows.

Compiling takes most of the time, some seconds for each combination of dtype, head dims, kind of mask and features. So
shapes and masks vary freely here, combinations do not: most tests share those of ``KINDS`` with bfloat16 and head dim
64.
"""

import importlib.util

import pytest
import torch
from hypothesis import given, settings

from hf_flashmask import ColumnMask, flashmask_attention, masks
from hf_flashmask.attention import op
from tests.attention.test_oracle import built
from tests.attention.triton_checks import (
    ARBITRARY_GRAD_TOLERANCE,
    arbitrary,
    check_list,
    check_plan,
    compare,
    document,
    poison,
    qkv,
    row_error,
)
from tests.helpers import random_mask
from tests.huggingface.models import tiny, tokens

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton package"),
]

BF16 = torch.bfloat16
ALL = {"softcap": 5.0, "sinks": True, "dlse": True}
# (causal, bound vectors): the features it is tried with.
KINDS = {(True, 1): {}, (True, 2): ALL, (False, 2): {}, (False, 4): ALL}


def check(mask, **options):
    """compare(), on the GPU and with poisoned memory; bfloat16, head dim 64 and the kind's features unless told."""
    features = {} if "dtype" in options or "d" in options else KINDS[mask.causal, mask.bounds.shape[2]]
    with pytest.MonkeyPatch.context() as patch:
        poison(patch)
        compare(mask, **{"dtype": BF16, "d": 64, "dv": 64, "device": "cuda", **features, **options})


def attend(q, k, v, mask, **options):
    return flashmask_attention(q, k, v, mask, backend="triton", **options)


def grads(function, *tensors):
    out = function(*tensors)
    return out, *torch.autograd.grad(out.float().square().sum(), tensors)


# ---- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(built(8)))
def test_every_builder(name):
    for n in (61, 500):
        mask = built(n)[name]
        for part in (mask, mask[:, :, n // 2 :], mask[:, :, :, : 2 * n // 3]):
            check(part, kv_heads=2 if mask.shape[1] == 2 else 4)


# (dtype, D, Dv, kind of mask, features)
VARIANTS = [
    (BF16, 128, 128, (True, 1), {"transposed": True}),
    (BF16, 128, 128, (False, 4), ALL),
    (BF16, 256, 256, (True, 1), {}),
    (BF16, 192, 128, (True, 1), {}),
    (BF16, 72, 80, (False, 2), {"sinks": True}),
    (BF16, 20, 36, (False, 4), {}),  # rows of 40 bytes, which descriptors cannot address
    (torch.float16, 64, 64, (False, 2), {}),
    (torch.float32, 64, 64, (False, 4), ALL),
    (torch.float32, 128, 128, (True, 1), {}),
]


@pytest.mark.parametrize(("dtype", "d", "dv", "kind", "features"), VARIANTS)
def test_dtypes_head_dims_and_features(dtype, d, dv, kind, features):
    causal, vectors = kind
    structured = document(1000) if kind == (True, 1) else masks.document(lengths=[300, 1, 211])
    cases = [random_mask(257, 511, causal=causal, vectors=vectors, batch=2, heads=2)]
    if structured.bounds.shape[2] == vectors:
        cases += [structured, structured[:, :, 200:]]
    else:
        cases.append(masks.global_sliding_window(700, 16, 100))
    for mask, heads, kv_heads in zip(cases, (4, 4, 6), (2, 1, 6), strict=False):
        check(mask, heads=heads, kv_heads=kv_heads, dtype=dtype, d=d, dv=dv, **features)


@pytest.mark.parametrize(
    "n", [1, 2, 15, 17, 63, 64, 65, 127, 128, 129, 191, 193, 257, 383, 511, 640, 1001, 1025, 2047, 2113, 3001, 4097]
)
def test_lengths(n):
    check(document(n), batch=1, kv_heads=2)
    check(document(n)[:, :, n - max(1, n // 3) :], batch=2, kv_heads=1)


def test_sorted_keys():
    """The kernel that moves keys, for each dtype, odd head dims, views, and an order a batch row and key head."""
    mask = masks.random_eviction(1300, num_heads=2, batch_size=2)
    for dtype, d, dv in ((BF16, 64, 64), (torch.float16, 40, 24), (torch.float32, 128, 72)):
        check(mask, kv_heads=2, dtype=dtype, d=d, dv=dv, sort_keys=True)
    check(masks.random_eviction(2100), batch=1, kv_heads=1, sort_keys=True, transposed=True)


def test_masks_a_head():
    for (causal, vectors), heads in zip(KINDS, (4, 2, 4, 2), strict=True):
        check(random_mask(200, 230, causal=causal, vectors=vectors, batch=2, heads=heads), kv_heads=2)
        check(random_mask(200, 230, causal=causal, vectors=vectors, heads=heads), kv_heads=2, batch=3)


@settings(max_examples=100, deadline=None)
@given(arbitrary(longest=700))
def test_random_bounds(case):
    mask, options = case
    check(mask, grad_tol=ARBITRARY_GRAD_TOLERANCE, **options)


def test_lines_with_more_spans_than_fit(monkeypatch):
    from hf_flashmask.attention.triton import plan

    monkeypatch.setattr(plan, "MAX_SPANS", 1)
    check(masks.global_sliding_window(1000, 16, 100))
    mask = document(1000)
    start, end = mask.masked_intervals()
    start[..., 250:400], end[..., 250:400] = torch.tensor([300, 800])[:, None], torch.tensor([500, 1000])[:, None]
    check(ColumnMask(torch.stack((start, end), 3).flatten(2, 3), causal=False, q_len=1000))


def test_scales_and_large_scores():
    for scale in (-0.3, 0.0):
        check(document(300), scale=scale)
    # Almost one-hot weights: rounded scores, since q was rounded, but nothing overflows.
    check(document(300), scores=30.0, tol=3e-2, grad_tol=0.3)


def test_hidden_tiles_are_not_read():
    mask = masks.causal_document(lengths=[256, 300]).to("cuda")
    q, k, v = qkv(mask)

    def of_second(q, k, v):
        out = attend(q, k, v, mask)
        return out, *torch.autograd.grad(out[:, 256:].float().square().sum(), (q, k, v))

    expected = of_second(q, k, v)
    with torch.no_grad():
        k[:, :256], v[:, :256] = torch.nan, torch.nan
    for t, wanted in zip(of_second(q, k, v), expected, strict=True):
        assert torch.equal(t[:, 256:], wanted[:, 256:])


def test_memory_that_descriptors_cannot_address():
    """Rows that begin 2 bytes off, broadcast heads, and the broadcast gradient of a sum."""
    mask = document(300).to("cuda")
    flat = torch.randn(300 * 4 * 64 + 1, dtype=BF16, device="cuda")
    q = flat[1:].view(1, 300, 4, 64)
    k, v = (torch.randn(1, 300, 1, 64, dtype=BF16, device="cuda").expand(1, 300, 2, 64) for _ in "kv")

    def run(tensors, backend):
        tensors = [t.detach().requires_grad_() for t in tensors]
        out = flashmask_attention(*tensors, mask, backend=backend)
        return out, *torch.autograd.grad(out.sum((1, 2)).sum(), tensors)

    expected = run([t.double() for t in (q, k, v)], "reference")
    for t, wanted in zip(run((q, k, v), "triton"), expected, strict=True):
        assert row_error(t, wanted) <= 3e-2


@pytest.mark.parametrize("tma", [True, False])
def test_more_than_two_to_the_31_elements(tma, monkeypatch):
    from hf_flashmask.attention.triton import configs

    if not tma:
        monkeypatch.setattr(configs, "uses_tma", lambda *args: False)
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    n, heads, window, tail = 300_000, 64, 128, 512
    mask = masks.sliding_window(n, window, device="cuda")
    tensors = qkv(mask, heads, heads, 128)
    assert tensors[0].numel() > 2**31
    out = attend(*tensors, mask)
    do = torch.randn_like(out)
    results = (out.detach(), *torch.autograd.grad(out, tensors, do))
    small = masks.sliding_window(tail, window, device="cuda")
    # Exact where neither the rows nor what sees their keys reach beyond the piece.
    for piece, exact in (
        (slice(n - tail, n), slice(window, tail)), (slice(0, tail), slice(0, tail - window)),
    ):  # fmt: skip
        for h in (slice(0, 2), slice(heads - 2, heads)):
            inputs = [t.detach()[:, piece, h].double().requires_grad_() for t in tensors]
            expected = flashmask_attention(*inputs, small, backend="reference")
            expected = (expected, *torch.autograd.grad(expected, inputs, do[:, piece, h].double()))
            for t, wanted in zip(results, expected, strict=True):
                assert row_error(t[:, piece, h][:, exact], wanted[:, exact]) <= 3e-2
    del tensors, out, do, results
    torch.cuda.empty_cache()


# ---- the lists of tiles --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block_m", "block_n"), [(64, 128), (128, 64), (16, 32)])
def test_lists(block_m, block_n):
    for causal, vectors in KINDS:
        check_plan(
            random_mask(1000, 777, causal=causal, vectors=vectors, batch=2, heads=2).to("cuda"), block_m, block_n
        )
        rough = random_mask(9000, 50, causal=causal, vectors=vectors)
        bounds = rough.bounds.repeat_interleave(160, 3)[..., :7901].contiguous()
        check_plan(ColumnMask(bounds, causal=causal, q_len=9000).to("cuda"), block_m, block_n)


def test_lists_of_a_million_tokens():
    from hf_flashmask.attention.triton import plan

    n, window, block_m, block_n = 2**20, 4000, 64, 128
    mask = masks.sliding_window(n, window, device="cuda")
    top = torch.arange(0, n, block_m, device="cuda")[:, None]
    left = torch.arange(0, n, block_n, device="cuda")[None]
    # Some row of a tile, and every row of it, sees some key of it, and every key: the extremes decide.
    some = (left <= top + block_m - 1) & (left + block_n - 1 > top - window)
    every = (left + block_n - 1 <= top) & (left > top + block_m - 1 - window)
    expected = (some.to(torch.int8) + every.to(torch.int8))[None]
    assert check_list(plan.build(mask, block_m, block_n, by_columns=False), expected) == 0
    assert check_list(plan.build(mask, block_m, block_n, by_columns=True), expected.transpose(1, 2).contiguous()) == 0


def test_a_mask_takes_little_memory():
    """128K tokens in causal documents: at most 4 MiB, where a dense mask takes 16 GiB."""
    from hf_flashmask.attention import triton as backend

    mask = document(131072).to("cuda")
    assert backend.plan_bytes(mask, 128, 128, BF16) + mask.bounds.nbytes <= 4 * 2**20


def test_peak_memory_is_that_of_causal_attention():
    n, heads = 131072, 8
    mask = document(n).to("cuda")
    shape = (1, n, heads, 128)

    def peak(attention):
        torch.cuda.empty_cache()
        tensors = [torch.randn(shape, dtype=BF16, device="cuda", requires_grad=True) for _ in "qkv"]
        do = torch.randn(shape, dtype=BF16, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(attention(*tensors), tensors, do)
        return torch.cuda.max_memory_allocated() - before

    def causal(q, k, v):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True
            ).transpose(1, 2)

    assert peak(lambda *t: attend(*t, mask)) <= 1.05 * peak(causal)


# ---- repeating, compiling, capturing -------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [64, 128])
def test_the_same_bits_every_time(d):
    mask = document(1500).to("cuda")
    tensors = qkv(mask, d=d)
    first = grads(lambda *t: attend(*t, mask), *tensors)
    for i in range(20):
        # A new mask, so lists are made anew.
        again = grads(lambda *t: attend(*t, mask.clone(), deterministic=bool(i % 2)), *tensors)  # noqa: B023
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_lengths_batches_and_heads_compile_nothing_new():
    from hf_flashmask.attention.triton import launch, plan

    kernels = [launch.forward_kernel, launch.dq_kernel, launch.dkdv_kernel]
    kernels += [plan._columns_kernel, plan._rows_kernel, plan._order_kernel]

    def compiled():
        return {kernel.__name__: len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels}

    def run(n, batch=1, heads=4, kv_heads=2):
        mask = document(n).to("cuda")
        grads(lambda *t: attend(*t, mask), *qkv(mask, heads, kv_heads, batch=batch))

    run(200)
    before = compiled()
    assert all(before.values())
    for n in (1, 2, 16, 17, 31, 64, 100, 128, 129, 256, 1000, 1024, 2500):
        run(n)
    for batch, heads, kv_heads in ((1, 1, 1), (2, 16, 16), (3, 3, 1), (16, 32, 8)):
        run(160, batch, heads, kv_heads)
    assert compiled() == before


def test_falls_back_to_a_smaller_configuration(monkeypatch):
    from hf_flashmask.attention.triton import configs

    candidates = configs.candidates
    too_large = configs.Config(128, 128, 8, 6)
    monkeypatch.setattr(configs, "candidates", lambda kernel, *a: [too_large, *candidates(kernel, *a)])
    mask = document(300).to("cuda")
    q, k, v = qkv(mask, d=128, grad=False)
    expected = flashmask_attention(q.double(), k.double(), v.double(), mask, backend="reference")
    assert row_error(attend(q, k, v, mask), expected) <= 1e-2
    monkeypatch.setattr(configs, "candidates", lambda *a: [too_large])
    with pytest.raises(RuntimeError, match="no configuration of the forward kernel fits cuda.*use backend='torch'"):
        attend(q, k, v, mask)


def test_torch_compile():
    def loss(q, k, v, bounds):
        out = flashmask_attention(q, k, v, ColumnMask(bounds, causal=True))
        return out.float().square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    for n in (300, 450):
        mask = document(n).to("cuda")
        tensors = qkv(mask)
        expected = torch.autograd.grad(loss(*tensors, mask.bounds), tensors)
        for grad, wanted in zip(torch.autograd.grad(compiled(*tensors, mask.bounds), tensors), expected, strict=True):
            assert row_error(grad, wanted) <= 1e-2


def test_cuda_graphs_plan_for_the_bounds_they_meet():
    first, second = document(1000).to("cuda"), masks.causal(1000, device="cuda")
    mask = first.clone()
    tensors = qkv(mask)
    do = torch.randn(1, 1000, 4, 64, dtype=BF16, device="cuda")

    def step():
        out = attend(*tensors, mask)
        return out, *torch.autograd.grad(out, tensors, do)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for other in (second, first, second):
        mask.bounds.copy_(other.bounds)
        for t in tensors:
            t.data.normal_()
        graph.replay()
        out = attend(*tensors, other)
        expected = (out, *torch.autograd.grad(out, tensors, do))
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
        # An eager call in between sees them too.
        assert torch.equal(attend(*tensors, mask), out)


def test_autocast_does_not_lower_float32_inputs():
    mask = document(300).to("cuda")
    for dtype, d in ((torch.float32, 128), (BF16, 64)):
        tensors = qkv(mask, d=d, dtype=dtype)
        expected = grads(lambda *t: attend(*t, mask), *tensors)
        with torch.autocast("cuda", torch.float16):
            out = grads(lambda *t: attend(*t, mask), *tensors)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


# ---- models --------------------------------------------------------------------------------------------------------


@pytest.fixture
def lists(monkeypatch):
    """(tile shape, by columns) of every list that is made."""
    from hf_flashmask.attention.triton import plan

    made, build = [], plan.build

    def counted(mask, *shape, by_columns):
        made.append((*shape, by_columns))
        return build(mask, *shape, by_columns=by_columns)

    monkeypatch.setattr(plan, "build", counted)
    return made


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, lists):
    from torch.utils.checkpoint import checkpoint

    mask = document(300).to("cuda")
    x = torch.randn(1, 300, 2, 64, dtype=BF16, device="cuda", requires_grad=True)

    def layer(x):
        return attend(x, x * 0.5, x * 2.0, mask)

    expected = grads(lambda x: layer(layer(x)), x)
    assert len(lists) == len(set(lists)) <= 3
    out = checkpoint(layer, checkpoint(layer, x, use_reentrant=reentrant), use_reentrant=reentrant)
    out.float().square().sum().backward()
    assert torch.equal(out, expected[0])
    assert torch.equal(x.grad, expected[1])
    # Layers, their recomputation and both backwards share what the first made.
    assert len(lists) == len(set(lists)) <= 3


def test_a_model_plans_once_and_copies_nothing(lists, monkeypatch):
    from transformers.models.llama import modeling_llama

    options = {"hidden_size": 256, "num_hidden_layers": 3}
    exact = tiny("llama", "eager", **options).cuda()
    eager, ours = (tiny("llama", name, **options).to("cuda", BF16) for name in ("eager", "flashmask"))
    ids = tokens(2, 97).cuda()
    position_ids = torch.cat([torch.arange(n) for n in (40, 57)]).repeat(2, 1).cuda()
    packed = {"position_ids": position_ids, "use_cache": False}

    rotated, values, given = [], [], []
    rotate, attention = modeling_llama.apply_rotary_pos_emb, op.attention

    def rotating(*args, **kwargs):
        pair = rotate(*args, **kwargs)
        rotated.append([t.data_ptr() for t in pair])
        return pair

    def recorded(q, k, v, *rest):
        given.append([t.data_ptr() for t in (q, k, v)])
        return attention(q, k, v, *rest)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotating)
    monkeypatch.setattr(op, "attention", recorded)
    for layer in ours.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda module, args, out: values.append(out.data_ptr()))
    loss = ours(ids, labels=ids, **packed).loss
    assert given == [[*pair, value] for pair, value in zip(rotated, values, strict=True)]
    assert len(given) == 3
    assert len(lists) == 1
    loss.backward()
    assert len(lists) == len(set(lists)) <= 3
    assert all(parameter.grad.isfinite().all() for parameter in ours.parameters() if parameter.grad is not None)

    with torch.no_grad():
        alone = torch.cat([exact(part, use_cache=False).logits for part in ids.split((40, 57), 1)], 1)
        theirs = torch.cat([eager(part, use_cache=False).logits for part in ids.split((40, 57), 1)], 1)
        assert row_error(ours(ids, **packed).logits, alone) <= 1.5 * row_error(theirs, alone) + 1e-3


def test_a_cache_of_transformers_is_read_in_place(monkeypatch):
    """Keys and values of a cache are [B, H, S, D] in memory: their transposed views go to the kernels."""
    given, attention = [], op.attention
    monkeypatch.setattr(op, "attention", lambda *args: given.extend(args[:3]) or attention(*args))
    q, k, v = (torch.randn(2, h, 300, 64, dtype=BF16, device="cuda") for h in (4, 2, 2))
    mask = document(300).to("cuda")
    out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)
    assert [t.data_ptr() for t in given] == [q.data_ptr(), k.data_ptr(), v.data_ptr()]
    assert not given[0].is_contiguous()
    assert torch.equal(out, attend(*(t.transpose(1, 2).contiguous() for t in (q, k, v)), mask))


def test_auto_takes_these_kernels():
    mask = document(300).to("cuda")
    tensors = qkv(mask, grad=False)
    assert torch.equal(flashmask_attention(*tensors, mask), attend(*tensors, mask))
    wide = qkv(mask, d=320, grad=False)
    assert torch.equal(flashmask_attention(*wide, mask), flashmask_attention(*wide, mask, backend="torch"))
    with pytest.raises(
        NotImplementedError, match="head dims up to 256, got 320 and 320; use backend='auto' or 'torch'"
    ):
        attend(*wide, mask)
