"""`flashmask check` without models: finds what is wrong, and nothing where nothing is."""

import pytest
import torch

from hf_flashmask.attention import torch_blocks
from hf_flashmask.cli import main
from hf_flashmask.diagnostics import selftest


def check(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(selftest, "TOLERANCES", {torch.float32: selftest.TOLERANCES[torch.float32]})
    with pytest.raises(SystemExit) as ended:
        main(["check", *arguments])
    return ended.value.code, capsys.readouterr().out


def test_a_sound_machine_passes(monkeypatch, capsys):
    code, printed = check(monkeypatch, capsys)
    assert not code
    assert f"all {len(selftest.CASES) * len(selftest.kernels()[0])} ok" in printed
    assert "FAILED" not in printed
    for case in selftest.CASES:
        assert f"\n{case.name} " in printed


@pytest.mark.parametrize("which", ["out", "lse", "dk", "nan"])
def test_one_wrong_row_fails(monkeypatch, capsys, which):
    forward, backward = torch_blocks.forward, torch_blocks.backward

    def wrong_forward(*args):
        out, lse = forward(*args)
        if which == "out":
            out[0, 77] *= 1.01
        elif which == "lse":
            lse[0, 1, 200] += 1e-3
        elif which == "nan":
            out[0, 3, 1, 5] = torch.nan
        return out, lse

    def wrong_backward(*args):
        grads = backward(*args)
        if which == "dk":
            grads[1][1, 100] *= 1.01
        return grads

    monkeypatch.setattr(torch_blocks, "forward", wrong_forward)
    monkeypatch.setattr(torch_blocks, "backward", wrong_backward)
    monkeypatch.setattr(selftest, "CASES", selftest.CASES[:2])
    code, printed = check(monkeypatch, capsys)
    assert code == 1
    assert "2 of 2 failed" in printed
    assert printed.count("FAILED") == 2


def test_what_raises_fails_and_what_is_late_is_said(monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch_blocks, "forward", broken)
    monkeypatch.setattr(selftest, "CASES", selftest.CASES[:1])
    code, printed = check(monkeypatch, capsys)
    assert code == 1
    assert "FAILED: RuntimeError: no kernel image is available" in printed
    code, printed = check(monkeypatch, capsys, "--seconds", "1e-9")
    assert code == 1
    assert "1 not run: 0 s were over" in printed
    assert "nothing was checked" in printed
