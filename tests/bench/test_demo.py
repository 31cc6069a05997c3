"""`flashmask demo`, small: the real thing end to end, in minutes at most."""

import pytest

pytest.importorskip("trl")

from hf_flashmask.bench import demo
from hf_flashmask.cli import main


def test_demo_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        demo, "Setup", lambda **given: SETUP(**given, vocab_size=400, hidden_size=32, layers=1, heads=2, kv_heads=1)
    )
    picture = tmp_path / "demo.png"
    main(["demo", "--out", str(picture), "--row-len", "512", "--steps", "3", "--threads", "1"])
    printed = capsys.readouterr().out
    gap = float(printed.split("largest difference over 3 steps: ")[1].split()[0])
    assert gap < 1e-4
    assert "sdpa, dense block mask" in printed
    assert picture.stat().st_size > 10_000


SETUP = demo.Setup


def test_texts_and_tokenizer():
    corpus = demo.texts()
    assert len(corpus) == 512
    tokenizer = demo.train_tokenizer(corpus, 600)
    assert len(tokenizer) == 600
    assert tokenizer.decode(tokenizer(corpus[0]).input_ids) == corpus[0]
