import pytest
import torch

from hf_flashmask import ColumnMask, masks

matplotlib = pytest.importorskip("matplotlib")


def test_text():
    assert masks.causal(3).draw() == "# . .\n# # .\n# # #"
    assert masks.causal(4).draw(2) == "+ .\n# +"
    assert str(masks.causal(4)) == repr(masks.causal(4))
    heads = ColumnMask(
        torch.stack([masks.causal(4).bounds[0, 0], masks.sliding_window(4, 1).bounds[0, 0]])[None], causal=True
    )
    assert heads.draw(head=1) == "# . . .\n. # . .\n. . # .\n. . . #"
    with pytest.raises(ValueError, match="head must be in"):
        heads.draw(head=2)


@pytest.mark.parametrize("n", [8, 100, 1000, 131072])
def test_plot_shows_the_tiles(n, tmp_path):
    from matplotlib.image import imread

    mask = masks.causal_document(lengths=[n // 4, n // 2, n - n // 4 - n // 2])
    figure = mask.plot(title="causal_document")
    axes = figure.axes[0]
    shown = axes.images[0].get_array()
    block = -(-n // 128)
    assert torch.equal(torch.as_tensor(shown.data), mask.tile_map(block, block)[0, 0])
    assert max(shown.shape) <= 128
    # Keys run along the top, queries down.
    assert axes.get_xlim() == (0, n)
    assert axes.get_ylim() == (n, 0)
    assert axes.xaxis.get_label_position() == "top"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("key", "query")
    figure.savefig(tmp_path / "mask.png")
    picture = imread(tmp_path / "mask.png")
    assert len({tuple(c) for c in (picture[::7, ::7, :3] * 255).astype(int).reshape(-1, 3)}) >= 3
