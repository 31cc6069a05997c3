"""Every builder against its definition in words, written as a predicate over (query, key)."""

import time

import numpy as np
import pytest
import torch

from hf_flashmask import masks

LENGTHS = [5, 1, 7, 4]
CU = [0, 5, 6, 13, 17]
N = 17


def dense(predicate, q_len=N, kv_len=N):
    return torch.tensor([[bool(predicate(i, j)) for j in range(kv_len)] for i in range(q_len)])


def doc(t):
    return next(d for d in range(len(LENGTHS)) if t < CU[d + 1])


def check(mask, predicate):
    assert torch.equal(mask.to_dense()[0, 0], dense(predicate, mask.q_len, mask.kv_len)), "\n" + mask.draw(N)


def test_full_and_causal():
    check(masks.full(N), lambda i, j: True)
    check(masks.full(N, q_len=3), lambda i, j: True)
    check(masks.causal(N), lambda i, j: j <= i)
    check(masks.causal(N, q_len=3), lambda i, j: j <= i + 14)
    check(masks.causal(3, q_len=N), lambda i, j: j <= i - 14)


@pytest.mark.parametrize("q_len", [N, 4])
def test_sliding_window(q_len):
    at = N - q_len
    check(masks.sliding_window(N, 4, q_len=q_len), lambda i, j: 0 <= i + at - j < 4)
    check(masks.sliding_window(N, (3, 0), q_len=q_len), lambda i, j: 0 <= i + at - j <= 3)
    check(masks.sliding_window(N, (2, 5), q_len=q_len), lambda i, j: -5 <= i + at - j <= 2)
    check(masks.sliding_window(N, (-1, 2), q_len=q_len), lambda i, j: j <= i + at + 2)
    check(masks.sliding_window(N, (2, -1), q_len=q_len), lambda i, j: i + at - j <= 2)


def test_documents_in_every_form():
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    forms = [{"cu_seqlens": CU}, {"cu_seqlens": torch.tensor(CU, dtype=torch.int32)}, {"lengths": LENGTHS}]
    forms += [{"position_ids": positions}, {"position_ids": positions[None]}, {"lengths": torch.tensor(LENGTHS)}]
    for form in forms:
        check(masks.causal_document(**form), lambda i, j: j <= i and doc(i) == doc(j))
        check(masks.document(**form), lambda i, j: doc(i) == doc(j))
    batch = masks.causal_document(lengths=[[5, 4], [2, 7]])
    assert batch.shape == (2, 1, 9, 9)
    assert torch.equal(batch.to_dense()[1:], masks.causal_document(lengths=[2, 7]).to_dense())
    rows = masks.causal_document(position_ids=torch.stack((positions, torch.arange(N))))
    assert torch.equal(rows.to_dense()[1:], masks.causal(N).to_dense())


def test_integers_of_other_libraries():
    assert torch.equal(masks.causal(np.int64(5)).bounds, masks.causal(5).bounds)
    documents = masks.causal_document(lengths=[[3, 2], [1, 4]]).bounds
    assert torch.equal(masks.causal_document(lengths=list(torch.tensor([[3, 2], [1, 4]]))).bounds, documents)
    groups = masks.share_question([[3, 2, 1], [1, 4, 2]]).bounds
    assert torch.equal(masks.share_question(torch.tensor([[3, 2, 1], [1, 4, 2]])).bounds, groups)
    assert torch.equal(masks.sliding_window(9, [2, 1]).bounds, masks.sliding_window(9, (2, 1)).bounds)


def test_share_question():
    groups = [[3, 2, 4], [2, 1, 1, 4]]
    part = [(g, p) for g, lengths in enumerate(groups) for p, n in enumerate(lengths) for _ in range(n)]
    check(
        masks.share_question(groups),
        lambda i, j: j <= i and part[i][0] == part[j][0] and part[j][1] in (0, part[i][1]),
    )


@pytest.mark.parametrize(("g", "w"), [(0, 2), (3, 2), (3, (1, 4)), (N, 1), (2, 0)])
def test_global_sliding_window(g, w):
    left, right = w if isinstance(w, tuple) else (w, w)
    check(masks.global_sliding_window(N, g, w), lambda i, j: i < g or j < g or -right <= i - j <= left)


def test_causal_blockwise():
    check(masks.causal_blockwise(CU), lambda i, j: j <= i and (doc(i) == doc(j) or doc(i) == 3))


def test_prefix_lm():
    check(masks.prefix_lm_causal(N, 6), lambda i, j: j <= i or j < 6)
    prefix = [2, 0, 7, 1]
    check(
        masks.prefix_lm_document(CU, prefix_lengths=prefix),
        lambda i, j: doc(i) == doc(j) and (j <= i or j - CU[doc(j)] < prefix[doc(j)]),
    )


def test_qk_sparse():
    dropped = [True, False, True, False]
    check(masks.qk_sparse(CU, dropped=dropped), lambda i, j: j <= i and not (dropped[doc(j)] and i < CU[doc(j) + 1]))


def test_hash_sparse():
    q, k = torch.randint(0, 4, (N,)), torch.randint(0, 4, (N,))
    q_at, k_at = q.argsort(stable=True), k.argsort(stable=True)
    check(masks.hash_sparse(q, k), lambda i, j: q[q_at[i]] == k[k_at[j]] and k_at[j] <= q_at[i])
    far = torch.tensor([-(2**62), -1, 2**61, 2**62])  # hashes of 64 bits
    assert torch.equal(masks.hash_sparse(far[q], far[k]).bounds, masks.hash_sparse(q, k).bounds)
    heads = masks.hash_sparse(q.expand(2, 3, N), k.expand(2, 3, N))
    assert torch.equal(heads.to_dense()[1, 2], masks.hash_sparse(q, k).to_dense()[0, 0])


def test_random_eviction():
    generator = torch.Generator().manual_seed(3)
    mask = masks.random_eviction(N, start=6, batch_size=2, num_heads=3, generator=generator)
    visible = mask.to_dense()
    assert mask.shape == (2, 3, N, N)
    assert visible.diagonal(dim1=2, dim2=3).all()
    assert not visible.triu(1).any()
    assert torch.equal(visible[:, :, :6, :6], masks.causal(6).to_dense().expand(2, 3, -1, -1))
    # Evicted once, gone for good; as many keys as rows that evict, but for those too young to go.
    assert (visible.int().diff(dim=2).clamp(max=0).sum(2) >= -1).all()
    evicted = mask.bounds[:, :, 0] < N
    assert ((evicted.sum(-1) >= (N - 6) - 6) & (evicted.sum(-1) <= N - 6)).all()
    assert not torch.equal(visible[0, 0], visible[1, 2])


def test_prefix_tree():
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        depth, parent = [], []
        for t in range(24):
            depth.append(int(torch.randint(0, (depth[-1] + 2 if depth else 1), (1,), generator=generator)))
            parent.append(
                next((p for p in range(t - 1, -1, -1) if depth[p] == depth[t] - 1), None) if depth[t] else None
            )

        def ancestors(t, parent=parent):
            while t is not None:
                yield t
                t = parent[t]

        mask = masks.prefix_tree(torch.tensor(depth))
        check(mask, lambda i, j: j in ancestors(i))
    assert masks.prefix_tree(torch.stack((torch.arange(24), torch.tensor(depth)))).shape == (2, 1, 24, 24)


@pytest.mark.parametrize("window", [None, 3])
def test_image_blocks(window):
    ids = [-1, 0, 0, 0, -1, -1, 1, 1, 1, 1, 2, 2, -1, 5, 5, -1, -1]
    check(
        masks.image_blocks(torch.tensor(ids), window_size=window),
        lambda i, j: (j <= i or (ids[i] == ids[j] >= 0)) and (window is None or i - j < window),
    )


def test_padding():
    keep = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0]])
    for causal in (True, False):
        mask = masks.padding(keep, causal=causal).to_dense()[:, 0]
        triangle = torch.ones(5, 5, dtype=torch.bool).tril() if causal else torch.ones(5, 5, dtype=torch.bool)
        assert torch.equal(mask, triangle & keep.bool()[:, None])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: masks.causal(0), "seq_len"),
        (lambda: masks.causal(3.5), "seq_len"),
        (lambda: masks.sliding_window(4, 0), "window_size"),
        (lambda: masks.sliding_window(4, (1, -2)), "window_size"),
        (lambda: masks.sliding_window(4, [1, 2, 3]), r"an int or a pair \(left, right\), got \[1, 2, 3\]"),
        (lambda: masks.global_sliding_window(9, 1, (1, 2, 3)), r"an int or a pair"),
        (lambda: masks.prefix_lm_document(lengths=[4], prefix_lengths=[-1]), "prefix_lengths must not be negative"),
        (lambda: masks.qk_sparse(lengths=[2, 3], dropped=[0.5, 0.2]), "dropped must be a non-empty 1-D integer"),
        (lambda: masks.share_question([3, 2]), "one .question, answer, .... a group"),
        (lambda: masks.share_question(torch.tensor([3, 2])), "one .question, answer, .... a group"),
        (lambda: masks.causal_document(), "exactly one of"),
        (lambda: masks.causal_document([0, 2], lengths=[2]), "exactly one of"),
        (lambda: masks.causal_document([0, 2], position_ids=torch.arange(2)), "documents once"),
        (lambda: masks.causal_document([1, 2]), "start with 0"),
        (lambda: masks.causal_document([0, 5, 3]), "not decrease"),
        (lambda: masks.causal_document(lengths=[2, -1]), "negative"),
        (lambda: masks.causal_document(lengths=[0, 0]), "no token"),
        (lambda: masks.causal_document(lengths=[[2, 3], [4]]), "as many tokens"),
        (lambda: masks.causal_document(lengths=torch.tensor([1.5])), "integer"),
        (lambda: masks.prefix_lm_document(CU, prefix_lengths=[1, 2]), "one entry a document"),
        (lambda: masks.qk_sparse(CU, dropped=[True]), "one entry a document"),
        (lambda: masks.share_question([[]]), "question"),
        (lambda: masks.global_sliding_window(8, -1, 2), "num_global"),
        (lambda: masks.hash_sparse(torch.zeros(4), torch.zeros(4)), "q_buckets"),
        (lambda: masks.prefix_tree(torch.tensor([0, 1, 3])), r"position_ids\[0, 2\] is 3"),
        (lambda: masks.prefix_tree(torch.tensor([4, 5])), r"position_ids\[0, 0\] is 4"),
        (lambda: masks.image_blocks(torch.tensor([0, -1, 0])), "consecutive"),
        (lambda: masks.padding(torch.ones(2, 3)), "attention_mask"),
    ],
)
def test_bad_arguments(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def build_128k():
    n = 131072
    lengths = [n // 128] * 128
    positions = torch.arange(n) % 1024
    return {
        "causal": lambda: masks.causal(n),
        "full": lambda: masks.full(n),
        "sliding_window": lambda: masks.sliding_window(n, 4096),
        "causal_document": lambda: masks.causal_document(lengths=lengths),
        "causal_document from position_ids": lambda: masks.causal_document(position_ids=positions),
        "document": lambda: masks.document(lengths=lengths),
        "share_question": lambda: masks.share_question([[512, 256, 256]] * 128),
        "global_sliding_window": lambda: masks.global_sliding_window(n, 16, 4096),
        "causal_blockwise": lambda: masks.causal_blockwise(lengths=lengths),
        "prefix_lm_causal": lambda: masks.prefix_lm_causal(n, n // 2),
        "prefix_lm_document": lambda: masks.prefix_lm_document(lengths=lengths, prefix_lengths=[99] * 128),
        "qk_sparse": lambda: masks.qk_sparse(lengths=lengths, dropped=[k % 2 for k in range(128)]),
        "hash_sparse": lambda: masks.hash_sparse(positions % 16, positions % 16),
        "random_eviction": lambda: masks.random_eviction(n),
        "prefix_tree": lambda: masks.prefix_tree(positions),
        "image_blocks": lambda: masks.image_blocks(torch.arange(n) // 256, window_size=4096),
        "padding": lambda: masks.padding(torch.ones(1, n, dtype=torch.int64)),
    }


@pytest.mark.timing
@pytest.mark.parametrize("name", build_128k())
def test_128k_tokens_take_under_50_ms(name):
    build = build_128k()[name]
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        build()
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.05
