"""`flashmask bench kernels`, `sparsity` and `plot`, small and on the CPU: the whole path."""

import csv
from itertools import pairwise

import pytest
import torch

from hf_flashmask import masks
from hf_flashmask.bench import accuracy, kernel_masks, kernels, peers, records, sparsity
from hf_flashmask.cli import main

CPU = ("--device", "cpu", "--backend", "torch")
SMALL = ("bench", "kernels", *CPU, "--lengths", "256", "--head-dims", "64", "--tokens", "256", "--hidden", "128")
PLUGIN = """
import torch
from hf_flashmask.bench.peers import Autograd


class Broken:
    def fwd(self):
        raise RuntimeError("no such kernel")


class Wrong(Autograd):
    def bwd(self):
        dq, dk, dv = super().bwd()
        return dq, dk * 1.05, dv


def dense(case):
    visible = case.mask.to_dense()
    attend = lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, visible)
    return lambda kind: kind(attend, case.heads_first[:3], case.heads_first[3], heads_first=True)


PEERS = {
    "dense": lambda case: dense(case)(Autograd),
    "wrong": lambda case: dense(case)(Wrong),
    "broken": lambda case: Broken(),
    "absent": lambda case: None,
}
"""


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "plugin.py"
    path.write_text(PLUGIN)
    return path


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_kernels_from_the_command_to_the_picture(tmp_path, capsys, plugin):
    out, picture = tmp_path / "kernels.csv", tmp_path / "kernels.png"
    names = ("flashmask", "sdpa_flash", "dense", "wrong", "broken", "absent")
    command = (*SMALL, "--masks", "causal_document", "--plugin", str(plugin), "--out", str(out), "--peers", *names)
    main(command)
    captured = capsys.readouterr()
    rows = {(row["peer"], row["pass"]): row for row in rows_of(out)}
    assert {peer for peer, _ in rows} == {"flashmask", "dense", "wrong", "broken"}  # the others have no such mask
    for which in ("fwd", "bwd"):
        for peer in ("flashmask", "dense"):
            row = rows[peer, which]
            assert row["note"] == ""
            assert float(row["error"]) < accuracy.TOLERANCE
            pairs = masks.causal_document(lengths=[98, 68, 90]).visible_pairs()
            flops = {"fwd": 4, "bwd": 10}[which] * pairs * 2 * 64
            assert float(row["tflops"]) == pytest.approx(flops / float(row["ms"]) / 1e9, rel=1e-2)
            assert row["command"].startswith("flashmask bench kernels --device cpu")
        assert rows["broken", which]["note"] == "RuntimeError: no such kernel"
        assert rows["broken", which]["ms"] == ""
    assert rows["wrong", "fwd"]["ms"] != ""
    assert rows["wrong", "bwd"]["ms"] == ""
    assert "relative error 0.05" in rows["wrong", "bwd"]["note"]
    assert "[1/1" in captured.err
    assert "256 tokens, head dim 64" in captured.out
    assert any(line.startswith("causal_document ") for line in captured.out.splitlines())

    main(["bench", "plot", str(out), "--out", str(picture)])
    assert picture.stat().st_size > 10_000


def test_time_budget_says_what_is_left_out_and_rows_are_appended(tmp_path, capsys):
    out = tmp_path / "kernels.csv"
    command = (*SMALL, "--peers", "flashmask", "--out", str(out), "--masks", "causal")
    main(command)
    main((*command, "full", "--time-budget", "0"))
    assert "2 of 2 cases left out: 256 x 64 causal, 256 x 64 full" in capsys.readouterr().out
    main(command)
    assert [row["pass"] for row in rows_of(out)] == ["fwd", "bwd"] * 2


def test_sparsity_from_the_command_to_the_picture(tmp_path, capsys):
    out = tmp_path / "sparsity.csv"
    shape = ("--seq-len", "512", "--head-dim", "16", "--heads", "1", "--batch", "1", "--count", "3")
    main(["bench", "sparsity", *CPU, *shape, "--out", str(out)])
    printed = capsys.readouterr().out
    assert len([line for line in printed.splitlines() if "R^2 = " in line]) == 2
    rows = rows_of(out)
    assert [int(row["tiles"]) for row in rows if row["pass"] == "fwd"] == sorted(
        (int(row["tiles"]) for row in rows if row["pass"] == "bwd"), reverse=True
    )
    main(["bench", "plot", str(out)])
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_splits_rise_evenly_in_sparsity():
    splits = sparsity.splits(4096, 40)
    shares = [sum(n * n for n in lengths) / 4096**2 for lengths in splits]
    assert splits == sparsity.splits(4096, 40)
    assert len(splits) == 40
    assert splits[0] == (4096,)
    assert all(sum(lengths) == 4096 and min(lengths) > 0 for lengths in splits)
    assert max(len(lengths) for lengths in splits) > 32
    steps = [a - b for a, b in pairwise(shares)]
    assert all(0 < step < 3 / 40 for step in steps)


def test_fit():
    line = sparsity.fit([1, 2, 3, 4], [3.0, 5.0, 7.0, 9.0])
    assert (line.slope, line.intercept, line.r_squared) == pytest.approx((2.0, 1.0, 1.0))
    assert sparsity.fit([1, 2, 3, 4], [1.0, -1.0, -1.0, 1.0]).r_squared == pytest.approx(0.0)


def test_reference_is_dense_attention(monkeypatch):
    monkeypatch.setattr(accuracy, "CHUNK_ELEMENTS", 300 * 70)  # several chunks, the last one ragged
    generator = torch.Generator().manual_seed(1)
    q, k, v, do = (torch.randn(2, 300, 3, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    mask = kernel_masks.build("causal_document", 300).mask & masks.sliding_window(300, 40)
    inputs = [t.transpose(1, 2).requires_grad_() for t in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*inputs, mask.to_dense())
    grads = [t.transpose(1, 2) for t in torch.autograd.grad(out, inputs, do.transpose(1, 2))]
    out = out.detach().transpose(1, 2)
    expected = accuracy.reference(q, k, v, do, mask)
    assert expected.out.shape == (2, accuracy.SAMPLED, 8)
    assert expected.forward_error(out) < 1e-5
    assert expected.backward_error(tuple(grads)) < 1e-5
    for i in range(3):
        off = [g * 1.1 if i == j else g for j, g in enumerate(grads)]
        assert expected.backward_error(tuple(off)) == pytest.approx(0.1, rel=0.01)
    out[0, 0, 0, 0] = float("nan")  # in a batch row that is not compared
    assert expected.forward_error(out) == float("inf")


def test_summary_compares_what_both_measured():
    rows = [
        {"seq_len": 256, "head_dim": 64, "mask": mask, "peer": peer, "pass": which, "tflops": tflops}
        for mask, peer, which, tflops in (
            ("causal", "flashmask", "fwd", "400"),
            ("causal", "flex", "fwd", "100"),
            ("full", "flashmask", "fwd", "90"),
            ("full", "flex", "fwd", "90"),
            ("full", "flashmask", "bwd", "80"),
            ("full", "flex", "bwd", ""),
        )
    ]
    lines = {line.split("  ")[0]: line.split() for line in kernels.summary(rows).splitlines()}
    assert lines["causal"] == ["causal", "400", "100", "4.00", "-", "-", "-"]
    assert lines["full"] == ["full", "90", "90", "1.00", "80", "-", "-"]
    assert lines["geometric mean"] == ["geometric", "mean", "2.00", "-"]


def test_refusals(tmp_path, plugin):
    out = ("--out", str(tmp_path / "kernels.csv"))
    for arguments, message in (
        (("--masks", "diagonal"), "masks must be among full, causal"),
        (("--peers", "fa9"), "peers must be among flashmask"),
        (("--lengths", "512"), "lengths must be at most 256"),
        (("--head-dims", "96"), "head_dims must divide"),
        (("--plugin", str(tmp_path / "none.py")), "is not a Python file"),
        (("--plugin", str(plugin), "--plugin", str(plugin)), "peers that there are already"),
    ):
        with pytest.raises(SystemExit, match=message):
            main((*SMALL, *arguments, *out))
    (tmp_path / "kernels.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit, match="has other columns"):
        main((*SMALL, *out))
    for path in ("kernels.csv", "none.csv"):
        with pytest.raises(SystemExit, match="comes from no benchmark|there is no"):
            main(["bench", "plot", str(tmp_path / path)])


def test_sdpa_and_flex_are_peers_of_the_masks_they_have():
    ours = ["flashmask", "flashmask_sorted", "flashmask_hopper", "flashmask_hopper_sorted"]
    assert list(peers.load()) == [*ours, "flex", "sdpa_flash", "sdpa_cudnn"]
    q, k, v, do = kernels.random_inputs((1, 8192, 1, 16), "cpu")
    for name in kernel_masks.MASKS:
        spec = kernel_masks.build(name, 8192)
        case = peers.KernelCase(spec, spec.mask, q, k, v, do, "torch")
        assert (peers.BUILT_IN["sdpa_flash"](case) is not None) == (name in ("full", "causal"))
        for hopper in ours[2:]:
            assert peers.BUILT_IN[hopper](case) is None  # no such GPU
        assert (peers.BUILT_IN["flashmask_sorted"](case) is not None) == (name == "random_eviction")


def test_environment_names_commit_and_versions():
    found = records.environment("cpu", "flashmask bench kernels", commit="abc")
    assert set(found) == set(records.ENVIRONMENT)
    assert found["commit"] == "abc"
    assert found["torch"] == torch.__version__
    assert records.environment("cpu")["commit"]
