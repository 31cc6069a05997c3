"""`flashmask demo`, small: the real thing end to end."""

import pytest

pytest.importorskip("trl")

from hf_flashmask.bench import demo
from hf_flashmask.cli import main

SMALL = demo.Setup(row_len=512, steps=3, vocab_size=400, hidden_size=32, layers=1, heads=2, kv_heads=1, threads=1)


def test_packed_training_is_training_one_by_one(tmp_path, capsys):
    picture = tmp_path / "demo.png"
    printed = demo.demo(picture, SMALL)
    gap = float(printed.split("largest difference over 3 steps: ")[1].split()[0])
    assert gap < 1e-4
    rows = [line.split() for line in printed.splitlines() if line.startswith(("flashmask ", "sdpa, dense"))]
    assert len(rows) == 2
    assert picture.stat().st_size > 10_000
    assert "flashmask, packed: 3 steps" in capsys.readouterr().out


def test_command_line(tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "demo", lambda path, setup: asked.append((path, setup)) or "the tables")
    main(["demo", "--out", str(tmp_path / "x.png"), "--row-len", "2048", "--steps", "5"])
    assert asked == [(tmp_path / "x.png", demo.Setup(row_len=2048, steps=5))]
    assert "the tables" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["demo", "--steps", "0"])
    assert "must be positive" in capsys.readouterr().err


def test_texts_and_tokenizer():
    corpus = demo.texts()
    assert len(corpus) == 512
    tokenizer = demo.train_tokenizer(corpus, 600)
    assert len(tokenizer) == 600
    assert tokenizer.decode(tokenizer(corpus[0]).input_ids) == corpus[0]
