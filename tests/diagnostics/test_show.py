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
        (["--file", "missing.pt"], "there is no missing.pt"),
        (["--position-ids", "0", "2"], "position_ids must be depths"),
        (["--model", "gpt5"], "no text model of type 'gpt5'; 'flashmask check --models' knows"),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "what to show"),
        (["--lengths", "3", "--position-ids", "0", "1"], "--position-ids does not go with --lengths"),
        (["--file", "mask.pt", "--model", "llama"], "--file does not go with --model"),
        (["--model", "llama", "--kind", "document"], "--kind does not go with --model"),
        (["--file", "mask.pt", "--length", "9"], "--length does not go with --file"),
        (["--model", "llama", "--lengths", "3", "2", "--length", "9"], "--length does not go with --lengths"),
    ],
)
def test_what_would_be_ignored_is_an_error_of_usage(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(["show", *arguments])
    assert ended.value.code == 2
    assert f"flashmask show: error: {message}" in capsys.readouterr().err


class Unknown:
    """What torch.load does not unpickle by itself."""


def not_masks():
    square = torch.ones(4, 4)
    return {
        "corrupt.npy": b"\x93NUMPY\x01\x00 and no more",
        "empty.npy": b"",
        "objects.npy": np.array([[{}]], dtype=object),
        "text.npy": np.array([["a", "b"]]),
        "corrupt.pt": b"PK\x03\x04 and no more",
        "empty.pt": b"",
        "pickled.pt": Unknown(),
        "sparse.pt": square.to_sparse(),
        "meta.pt": square.to("meta"),
        "folder.pt": None,
        "folder.npy": None,
    }


@pytest.mark.parametrize("name", not_masks())
def test_files_that_hold_no_mask(tmp_path, name):
    path, content = tmp_path / name, not_masks()[name]
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif name.endswith(".npy"):
        np.save(path, content)
    else:
        torch.save(content, path)
    with pytest.raises(
        SystemExit, match=f"flashmask: .*{name} (cannot be read as a saved|must hold a dense|is no file)"
    ):
        main(["show", "--file", str(path)])


def test_pictures_that_cannot_be_written(tmp_path):
    for out, message in {"mask.xyz": "must end in what pictures end in", "folder.png": "is a directory"}.items():
        (tmp_path / "folder.png").mkdir(exist_ok=True)
        with pytest.raises(SystemExit, match=f"flashmask: --out .*{message}"):
            main(["show", "--lengths", "3", "--out", str(tmp_path / out)])
