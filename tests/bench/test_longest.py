"""``flashmask bench longest``: the search, and on a CPU a step of what it runs."""

import pytest
import torch

from hf_flashmask.bench import longest, records


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 5, 8, 13, 31, 32])
def test_search(limit):
    tried = []

    def fits(tokens):
        tried.append(tokens)
        return tokens <= limit * 10 + 9

    assert longest.search(fits, step=10, most=330) == (limit * 10, True)
    assert len(tried) == len(set(tried)) <= 12


def test_search_ends_at_the_most_and_when_stopped():
    assert longest.search(lambda tokens: True, step=10, most=335) == (330, False)
    assert longest.search(lambda tokens: None if tokens > 20 else True, step=10, most=335) == (20, False)


def test_lengths_until_memory_is_out(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    model = {"layers": 3, "layers_run": 1, "hidden": 64, "heads": 4, "intermediate": 96, "vocab_size": 512}
    setup = longest.Setup(
        methods=("sdpa", "flashmask"), document=48, step=32, most=256, device="cpu", dtype="float32",
        out=tmp_path / "longest.csv", **model,
    )  # fmt: skip
    real, asked = torch.empty, []

    def empty(*size, **options):
        if size[0] == 2 and len(size) == 3:  # what the layers left out save
            asked.append(size)
            if size[1] > 96:
                raise torch.OutOfMemoryError("no room")
        return real(*size, **options)

    monkeypatch.setattr(longest.torch, "empty", empty)
    table = longest.run(setup)
    rows = records.read(tmp_path / "longest.csv")
    assert [(r["method"], r["tokens"], r["fits"]) for r in rows] == [
        (method, *rest)
        for method in ("sdpa", "flashmask")
        for rest in (("32", "yes"), ("64", "yes"), ("128", "no"), ("96", "yes"))
    ]
    assert {size[2] for size in asked} == {64}
    assert table.count("96  ") == 2
    with pytest.raises(records.Refusal, match="layers run must be between 1 and the 3"):
        longest.Setup(device="cpu", layers=3, layers_run=4)
