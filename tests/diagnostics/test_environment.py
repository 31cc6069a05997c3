"""`flashmask env`."""

import importlib
import importlib.util

import pytest
import torch

import hf_flashmask
from hf_flashmask.attention import flashmask_attention
from hf_flashmask.cli import main
from hf_flashmask.diagnostics import environment


def test_holds_what_a_bug_report_needs(capsys, monkeypatch):
    if importlib.util.find_spec("triton") is not None:
        # Before the variable is set, which would leave Triton's functions interpreted for all later tests.
        importlib.import_module("hf_flashmask.attention.triton.launch")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    main(["env"])
    printed = capsys.readouterr().out
    facts = dict(line.split(None, 1) for line in printed.split("\n\n")[0].splitlines())
    assert facts["hf-flashmask"].startswith(hf_flashmask.__version__)
    assert torch.__version__.startswith(facts["torch"].split("+")[0])
    assert facts["TRITON_INTERPRET"] == "1"
    assert facts["HF_HUB_OFFLINE"] == "1"  # set for all tests


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_reasons_are_those_of_the_backends(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.randn(1, 8, 1, 128)
    report = environment.report()
    for backend in ("triton", "hopper"):
        with pytest.raises(NotImplementedError) as refused:
            flashmask_attention(q, q, q, backend=backend)
        assert f"{backend}  {refused.value}" in report
    taken = [line.split()[-2:] for line in report.splitlines() if line.startswith(("float32 ", "bfloat16 "))]
    assert taken == [["torch", "torch"]] * 6


def test_tiles_are_those_that_a_gpu_would_take(monkeypatch):
    triton = pytest.importorskip("hf_flashmask.attention.triton.launch")
    monkeypatch.setattr(triton, "_device", lambda device: ((9, 0), 232448))
    # Of a device only its kind is asked here.
    (text,) = environment._tiles(torch.device("cuda", 0))
    rows = {tuple(line.split()[:2]): line for line in text.splitlines()}
    assert "128 x 64, 4 warps, 2 stages" in rows["bfloat16", "128"]
    assert "64 x 64, 4 warps, 3 stages" in rows["bfloat16", "128"]
    assert "32 x 32, 4 warps, 1 stages" in rows["float32", "128"]
