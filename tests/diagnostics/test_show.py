"""`flashmask show`: drawn masks are those of the builders, of files and of models."""

import numpy as np
import pytest
import torch

from hf_flashmask import masks
from hf_flashmask.cli import MASKS_OF_LENGTHS, main
from hf_flashmask.diagnostics import show


def drawn(capsys, *arguments):
    main(["show", *arguments])
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", MASKS_OF_LENGTHS)
def test_lengths(capsys, kind):
    build = getattr(masks, kind)
    mask = build([[4, 2, 2]]) if kind == "share_question" else build(lengths=[4, 2, 2])
    assert mask.draw() in drawn(capsys, "--lengths", "4", "2", "2", "--kind", kind)
    assert MASKS_OF_LENGTHS == show.OF_LENGTHS


def test_position_ids(capsys):
    printed = drawn(capsys, "--position-ids", *["0", "1", "2", "3", "2", "3", "0", "1"])
    assert masks.prefix_tree(torch.tensor([0, 1, 2, 3, 2, 3, 0, 1])).draw() in printed


@pytest.mark.parametrize("form", ["bool.pt", "additive.pt", "two_dimensions.npy"])
def test_files(capsys, tmp_path, form):
    mask = masks.causal_document(lengths=[3, 5])
    dense = mask.to_dense()
    if form == "additive.pt":
        dense = torch.zeros(dense.shape).masked_fill(~dense, torch.finfo(torch.float32).min)
    path = tmp_path / form
    if form.endswith(".npy"):
        np.save(path, dense[0, 0].numpy())
    else:
        torch.save(dense, path)
    assert mask.draw() in drawn(capsys, "--file", str(path))


def test_a_models_layers(capsys):
    printed = drawn(capsys, "--model", "gemma2", "--lengths", "10", "6")
    packed = masks.causal_document(lengths=[10, 6])
    windowed = packed & masks.sliding_window(16, 4)
    local, everywhere = printed.split("\n\n")
    assert local.startswith("model.layers.[0, 2].self_attn: ")
    assert windowed.draw() in local
    assert everywhere.startswith("model.layers.[1, 3].self_attn: ")
    assert packed.draw() in everywhere


def test_an_encoders_layers_and_a_picture(capsys, tmp_path):
    found = show.from_model("bert", [8])
    (mask,) = found.values()
    assert torch.equal(mask.to_dense(), masks.full(8).to_dense())
    path = tmp_path / "deep" / "mask.png"
    assert f"wrote {path}" in drawn(capsys, "--model", "modernbert", "--length", "24", "--out", str(path))
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "what to show"),
        (["--file", "missing.pt"], "there is no missing.pt"),
        (["--position-ids", "0", "2"], "position_ids must be depths"),
        (["--model", "gpt5"], "no text model of type 'gpt5'"),
        (["--model", "bloom"], "computes attention itself"),
        (["--lengths", "3", "--head", "7"], None),
    ],
)
def test_bad_input(capsys, arguments, message):
    if message is None:  # a mask of one head serves every head
        assert masks.causal(3).draw() in drawn(capsys, *arguments)
        return
    with pytest.raises(SystemExit, match=message):
        main(["show", *arguments])


def test_masks_that_bounds_cannot_hold(tmp_path):
    torch.save(torch.tensor([[1, 0, 1, 0, 1, 0, 1, 0]] * 8, dtype=torch.bool).T.clone(), tmp_path / "stripes.pt")
    with pytest.raises(SystemExit, match="hides 4 separate query intervals"):
        main(["show", "--file", str(tmp_path / "stripes.pt")])
