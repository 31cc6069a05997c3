"""The kernels for few queries on a GPU against dense attention in float64, and what only a GPU shows."""

import importlib.util

import pytest
import torch

from hf_flashmask import ColumnMask, flashmask_attention, masks
from hf_flashmask.attention.paged import paged_attention
from tests.attention.triton_checks import compare, poison, row_error
from tests.helpers import random_mask
from tests.huggingface.models import tiny, tokens

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton package"),
]

BF16 = torch.bfloat16


def structured(q_len, kv_len, first, last, batch=1):
    """Keys [first, last) of every row, and of batch row b the first b * 100 of them hidden too."""
    key = torch.arange(kv_len)
    visible = (key >= first + 100 * torch.arange(batch)[:, None]) & (key < last)
    bounds = torch.stack((visible * q_len, torch.zeros_like(visible)), 1).int()[:, None]
    return ColumnMask(bounds.contiguous(), causal=False, q_len=q_len)


def together(mask, keys=150):
    """Neighbouring keys share their bounds, which makes hidden and full blocks."""
    bounds = mask.bounds[..., torch.arange(mask.kv_len) // keys * keys]
    return ColumnMask(bounds.contiguous(), causal=mask.causal, q_len=mask.q_len)


# (mask, shapes and features)
CASES = [
    (lambda: masks.causal(5000, q_len=1), {"heads": 32, "kv_heads": 8, "d": 128, "dv": 128}),
    (lambda: structured(1, 9001, 600, 7777, batch=3), {"heads": 32, "kv_heads": 8, "d": 128, "dv": 128, "batch": 3}),
    (lambda: masks.causal(3001, q_len=8), {"heads": 32, "kv_heads": 8, "d": 128, "dv": 128, "transposed": True}),
    (lambda: together(random_mask(16, 2222, causal=True, vectors=2)), {"kv_heads": 2, "sinks": True}),
    (
        lambda: together(random_mask(5, 3000, causal=False, vectors=4, batch=2, heads=4)),
        {"kv_heads": 2, "softcap": 5.0},
    ),
    (lambda: random_mask(3, 1111, causal=False, vectors=2, heads=2), {"kv_heads": 2, "dtype": torch.float16}),
    (lambda: masks.causal(700, q_len=16), {"heads": 16, "kv_heads": 1, "d": 64, "dv": 64}),
    (lambda: masks.causal(1500, q_len=2), {"d": 256, "dv": 256, "kv_heads": 1}),
    (lambda: structured(4, 1500, 10, 1400), {"d": 72, "dv": 136, "kv_heads": 2, "batch": 1}),
    (lambda: masks.causal(700, q_len=3), {"d": 64, "dv": 64, "kv_heads": 2, "dtype": torch.float32}),
    (lambda: masks.causal(20, q_len=1), {"d": 20, "dv": 36, "kv_heads": 4}),  # rows of 40 bytes
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(CASES)))
def test_against_dense_attention(case):
    mask, features = CASES[case]
    with pytest.MonkeyPatch.context() as patch:
        poison(patch)
        compare(mask(), gradients=False, **{"dtype": BF16, "d": 64, "dv": 64, "device": "cuda", **features})


def cache(batch, length, heads=8, d=128):
    return [torch.randn(batch, heads, length, d, dtype=BF16, device="cuda").transpose(1, 2) for _ in "kv"]


def attend(q, k, v, mask):
    return flashmask_attention(q, k, v, mask, backend="triton")


def test_a_graph_holds_for_other_bounds_and_the_tail_is_never_read():
    """Captured once over a static cache, replayed as it fills; nothing waits for the host."""
    q = torch.randn(2, 1, 32, 128, dtype=BF16, device="cuda")
    k, v = (torch.full((2, 8, 9000, 128), torch.nan, dtype=BF16, device="cuda").transpose(1, 2) for _ in "kv")
    bounds = torch.zeros(2, 1, 2, 9000, dtype=torch.int32, device="cuda")
    mask = ColumnMask(bounds, causal=False, q_len=1)
    attend(q, k, v, mask)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attend(q, k, v, mask)
        with torch.cuda.graph(graph):
            out = attend(q, k, v, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for filled in (0, 1, 63, 64, 65, 1000, 8999, 9000):
        k[:, :filled], v[:, :filled] = (t[:, :filled] for t in cache(2, 9000))
        bounds[:, :, 0] = torch.arange(9000, device="cuda") < filled
        graph.replay()
        if filled:
            inputs = (
                q.double(),
                k[:, :filled].double(),
                v[:, :filled].double(),
                masks.full(filled, q_len=1).to("cuda"),
            )
            assert row_error(out, flashmask_attention(*inputs, backend="reference")) <= 1e-2
        else:
            assert (out == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("kv_len", [100, 5000])  # one split, many
def test_layers_alike_are_launched_alike(kv_len):
    """A call like the one before it skips all checks; other addresses, sinks and an odd one must not be mixed up."""
    mask = masks.causal(kv_len, q_len=2, device="cuda")
    layers = []
    for layer in range(4):
        q = torch.randn(3, 2, 32, 128, dtype=BF16, device="cuda")
        k, v = cache(3, kv_len)
        if layer == 2:  # not where Triton found the first, to 16 bytes
            q = torch.randn(q.numel() + 1, dtype=BF16, device="cuda")[1:].view(q.shape)
        layers.append((q, k, v, torch.randn(32, device="cuda")))
    for with_sinks in (False, True):
        for q, k, v, sinks in layers:
            given = {"sinks": sinks if with_sinks else None}
            out = flashmask_attention(q, k, v, mask, backend="triton", **given)
            doubles = [t.double() for t in (q, k, v)]
            assert row_error(out, flashmask_attention(*doubles, mask, backend="reference", **given)) <= 1e-2
            assert mask._cache["repeat"][0][:3] == ("tokens", mask.version, q.shape)


@torch.no_grad()
@pytest.mark.parametrize("full_prefix", [0, 200])
def test_pages_are_followed(full_prefix):
    """Rows of different lengths; pages in any order, unused entries never read, with and without a look at bounds."""
    lengths = torch.tensor([1000, 201, 640], device="cuda")
    table = torch.full((3, 8), -1, dtype=torch.int32, device="cuda")
    order = torch.randperm(24, device="cuda").int()
    for b, length in enumerate(lengths.tolist()):
        table[b, : -(-length // 128)] = order[8 * b : 8 * b + -(-length // 128)]
    visible = torch.arange(1024, device="cuda") < lengths[:, None]
    mask = ColumnMask((visible * 2).int()[:, None, None], causal=True, q_len=2)
    mask.full_prefix = full_prefix
    pages = torch.randn(2, 24, 128, 8, 64, dtype=BF16, device="cuda")
    q = torch.randn(3, 2, 32, 64, dtype=BF16, device="cuda")
    out = paged_attention(q, *pages, table, mask, backend="triton")
    k, v = (t[table.clamp(min=0)].flatten(1, 2).double() for t in pages)
    assert row_error(out, flashmask_attention(q.double(), k, v, mask, backend="reference")) <= 1e-2


def test_lengths_batches_and_heads_compile_nothing_new():
    from hf_flashmask.attention.triton import decode_launch

    def compiled():
        kernels = (decode_launch.decode_kernel, decode_launch.combine_kernel)
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    def run(kv_len, batch=1, heads=8, kv_heads=2, q_len=1):
        mask = masks.causal(kv_len, q_len=q_len, device="cuda")
        attend(torch.randn(batch, q_len, heads, 128, dtype=BF16, device="cuda"), *cache(batch, kv_len, kv_heads), mask)

    for kv_len in (20, 2000, 70000):  # one split, few, many
        run(kv_len)
    before = compiled()
    assert decode_launch._compiled  # launched by key from the second time on
    for kv_len in (1, 16, 17, 1000, 1024, 50000):
        run(kv_len)
    for shape in ((2, 16, 16), (3, 3, 1), (16, 32, 8), (1, 4, 2, 7)):
        run(160, *shape)
    assert compiled() == before


def test_caches_of_more_than_two_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    k, v = (torch.empty(24, 8, 131072, 128, dtype=BF16, device="cuda").normal_().transpose(1, 2) for _ in "kv")
    q = torch.randn(24, 1, 8, 128, dtype=BF16, device="cuda")
    out = attend(q, k, v, masks.causal(131072, q_len=1, device="cuda"))
    for b, h in ((0, 0), (23, 7)):
        qb, kb, vb = (t[b, :, h].double() for t in (q, k, v))
        expected = ((qb @ kb.T) * 128**-0.5).softmax(-1) @ vb
        assert row_error(out[b, :, h], expected) <= 1e-2


@torch.no_grad()
@pytest.mark.parametrize(("name", "graphs"), [("llama", 1), ("mistral", 2)])  # one more for a full window
def test_compiled_generate_with_a_static_cache(name, graphs):
    """Transformers compiles decoding with CUDA graphs; one graph serves all steps, and tokens are sdpa's."""
    ids = tokens(2, 9).cuda()
    keep = torch.ones_like(ids)
    keep[1, :4] = 0
    common = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = tiny(name, "sdpa").cuda().generate(ids, attention_mask=keep, **common)
    ours = tiny(name, "flashmask").cuda()
    assert torch.equal(ours.generate(ids, attention_mask=keep, **common), expected)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = ours.generate(ids, attention_mask=keep, cache_implementation="static", **common)
    assert torch.equal(compiled, expected)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert not counters["inductor"].get("cudagraph_skips")
