"""What the tests of the Triton kernels share, in the interpreter and on a GPU."""

import torch
from hypothesis import strategies as st

from hf_flashmask import ColumnMask, flashmask_attention, masks
from tests.helpers import random_mask

# (causal, bound vectors)
KINDS = [(True, 1), (True, 2), (False, 2), (False, 4)]

# Largest error of a row, forward and backward: some 16-bit roundings of the weights, a few of float32.
TOLERANCE = {torch.bfloat16: (1e-2, 3e-2), torch.float16: (2e-3, 5e-3), torch.float32: (1e-5, 1e-4)}

# The same of gradients in 16 bits where masks are arbitrary. A row that sees a handful of keys may have next to no
# gradient, of differences with the row's delta, a sum over the rounded output: once in a thousand masks more than 3e-2,
# at most 6e-2 of 18000, in exact arithmetic with these roundings.
ARBITRARY_GRAD_TOLERANCE = 0.1


def poison(monkeypatch):
    """Memory that nobody wrote reads as NaN, and as nonsense where plans are."""
    new_empty, empty = torch.Tensor.new_empty, torch.empty

    def poisoned(t):
        return t.fill_(torch.nan if t.is_floating_point() else 0x5A5A if t.dtype == torch.int16 else 0x5A5A5A5A)

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *a, **k: poisoned(new_empty(t, *a, **k)))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))


def row_error(actual, expected):
    """The largest error of a row (over the last dimension), relative to that row and to the typical one.

    One wrong row shows, however many are right. An expectation of nothing but rounding counts as 0.05 an entry.
    """
    expected = expected.detach().double()
    error = (actual.detach().double() - expected).norm(dim=-1)
    own = expected.norm(dim=-1)
    typical = own.square().mean().sqrt()
    return float((error / (own + typical + 0.05 * expected.shape[-1] ** 0.5)).max())


def compare(mask, *, heads=4, kv_heads=4, batch=2, d=16, dv=16, softcap=None, sinks=False, dlse=False, scale=None,
            dtype=torch.float32, device="cpu", transposed=False, scores=1.0, tol=None, grad_tol=None,
            backend="triton", gradients=True, sort_keys=False):  # fmt: skip
    """Output, lse and, unless told, the gradient of every input against dense attention in float64.

    ``transposed``: inputs and the output's gradient are views of [B, H, S, D] memory. ``scores`` scales q.
    """
    default = TOLERANCE[dtype]
    tol, grad_tol = tol or default[0], grad_tol or default[1]
    make = {"dtype": torch.float32, "device": device}

    def tensor(length, n, width):
        if transposed:
            return torch.randn(batch, n, length, width, **make).to(dtype).transpose(1, 2)
        return torch.randn(batch, length, n, width, **make).to(dtype)

    q, k = tensor(mask.q_len, heads, d) * scores, tensor(mask.kv_len, kv_heads, d)
    inputs = [q, k, tensor(mask.kv_len, kv_heads, dv)]
    if sinks:
        inputs.append(torch.randn(heads, **make))
    inputs = [t.requires_grad_(gradients) for t in inputs]
    do = tensor(mask.q_len, heads, dv)
    dl = torch.randn(batch, heads, mask.q_len, **make)
    mask = mask.to(device)

    def run(tensors, backend):
        out, lse = flashmask_attention(
            *tensors[:3], mask, softcap=softcap, sinks=tensors[3] if sinks else None, softmax_scale=scale,
            return_lse=True, backend=backend, sort_keys=sort_keys and backend != "reference",
        )  # fmt: skip
        if not gradients:
            return out, lse, ()
        weights = [do.to(out.dtype)]
        if dlse:
            weights.append(dl.to(lse.dtype).masked_fill(lse == -torch.inf, 0.0))
        return out, lse, torch.autograd.grad([out, lse][: len(weights)], tensors, weights)

    out, lse, grads = run(inputs, backend)
    expected, expected_lse, expected_grads = run(
        [t.detach().double().requires_grad_(gradients) for t in inputs], "reference"
    )
    assert out.dtype == dtype
    assert out.shape == expected.shape
    assert lse.dtype == torch.float32
    alive = expected_lse > -torch.inf
    assert torch.equal(lse > -torch.inf, alive)
    errors = {"out": row_error(out, expected) / tol}
    errors["lse"] = float((lse - expected_lse).detach()[alive].abs().max() if alive.any() else 0) / (2 * tol)
    for name, t, grad, wanted in zip(("q", "k", "v", "sinks"), inputs, grads, expected_grads, strict=False):
        assert (grad.dtype, grad.shape) == (t.dtype, t.shape), name
        errors[name] = row_error(grad, wanted) / grad_tol
    # NaN compares false.
    assert all(error <= 1.0 for error in errors.values()), {name: f"{error:.3g}" for name, error in errors.items()}
    return errors


def tile_states(tiles, masks, along):
    """int8 [masks, lines, along], as tile_map's, of a TileList: what its spans visit, each tile once, ascending."""
    spans = tiles.spans[:-1].view(masks, tiles.lines, 2, tiles.capacity, 2).long()
    first, last = spans.unbind(-1)
    counts = tiles.counts.long()[..., None]
    # Beyond the spans in use lies anything: they are those that begin before the count is reached.
    length = last - first
    before = length.cumsum(-1) - length
    used = torch.cat((counts > 0, (before[..., 1:] < counts) & (before[..., 1:] > 0)), -1).cumprod(-1).bool()
    assert torch.equal((length * used).sum(-1), counts[..., 0])
    assert (~used | ((first >= 0) & (first < last) & (last <= along))).all()
    assert (~used[..., 1:] | (first[..., 1:] >= last[..., :-1])).all()
    changes = torch.zeros(masks, tiles.lines, 2, along + 1, dtype=torch.int64, device=spans.device)
    changes.scatter_add_(-1, first * used, used.long())
    changes.scatter_add_(-1, last * used, -used.long())
    visited = changes.cumsum(-1)[..., :-1]
    assert int(visited.sum(2).max()) <= 1
    return (visited[:, :, 0] + 2 * visited[:, :, 1]).to(torch.int8)


def expected_states(mask, block_m, block_n):
    """tile_map as a plan has it: the last block of columns also holds columns that do not exist, so it is partial."""
    states = mask.tile_map(block_m, block_n).flatten(0, 1)
    if mask.kv_len % block_n:
        states[..., -1].clamp_(max=1)
    return states


def check_list(tiles, expected):
    """A list against the states [masks, lines, along] of all tiles; lines that do not fit are one partial span.

    Returns how many lines do not fit.
    """
    masks, _, along = expected.shape
    begins = [
        torch.nn.functional.pad(expected == kind, (1, 0)).to(torch.int8).diff(dim=-1).eq(1).sum(-1) for kind in (1, 2)
    ]
    too_many = torch.maximum(*begins) > tiles.capacity
    visited = (expected > 0).to(torch.int8)
    hull = visited.cummax(-1).values & visited.flip(-1).cummax(-1).values.flip(-1)
    expected = torch.where(too_many[..., None], hull, expected)
    assert torch.equal(tile_states(tiles, masks, along), expected)
    # Heaviest first: a partial tile weighs 9, a full one 8.
    weight = tiles.counts[..., 0] * 9 + tiles.counts[..., 1] * 8
    order = tiles.order.long()
    assert torch.equal(order.sort(-1).values, torch.arange(tiles.lines, device=order.device).expand_as(order))
    assert torch.equal(weight.gather(1, order), weight.sort(dim=-1, descending=True).values)
    return int(too_many.sum())


def check_plan(mask, block_m, block_n):
    """Both lists of a mask, made anew: every tile's state and the order of lines; returns how many do not fit."""
    from hf_flashmask.attention.triton import plan

    expected = expected_states(mask, block_m, block_n)
    rows = check_list(plan.build(mask, block_m, block_n, by_columns=False), expected)
    return rows + check_list(plan.build(mask, block_m, block_n, by_columns=True), expected.transpose(1, 2))


def document(n):
    return masks.causal_document(lengths=[n // 3, 1, n - n // 3 - 1] if n > 4 else [n])


def qkv(mask, heads=4, kv_heads=2, d=64, batch=1, dtype=torch.bfloat16, grad=True):
    lengths = ((mask.q_len, heads), (mask.kv_len, kv_heads), (mask.kv_len, kv_heads))
    return [torch.randn(batch, n, h, d, dtype=dtype, device="cuda", requires_grad=grad) for n, h in lengths]


@st.composite
def arbitrary(draw, longest):
    """(a mask of up to ``longest`` rows and columns, heads, batch and layout that it goes with)."""
    causal, vectors = draw(st.sampled_from(KINDS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    q_len, kv_len = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)]))
    batch = draw(st.integers(1, 3))
    shape = {"batch": draw(st.sampled_from([1, batch])), "heads": draw(st.sampled_from([1, kv_heads, heads]))}
    mask = random_mask(q_len, kv_len, causal=causal, vectors=vectors, generator=generator, **shape)
    # Neighbours that share their bounds make hidden and full tiles.
    together = draw(st.sampled_from([1, 40, 200]))
    bounds = mask.bounds[..., torch.arange(kv_len) // together * together]
    options = {"heads": heads, "kv_heads": kv_heads, "batch": batch, "transposed": draw(st.booleans())}
    return ColumnMask(bounds.contiguous(), causal=causal, q_len=q_len), options
