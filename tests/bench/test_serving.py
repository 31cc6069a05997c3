"""`flashmask bench serving`, small and on the CPU: sdpa's tokens on GSM8K prompts, from the command to the CSV."""

import csv

import pytest

from hf_flashmask.bench import serving
from hf_flashmask.cli import main

SMALL = ("bench", "serving", "--device", "cpu", "--dtype", "float32", "--layers", "1", "--hidden", "32", "--heads", "4")
SMALL = (*SMALL, "--kv-heads", "2", "--intermediate", "64", "--runs", "1", "--new-tokens", "4", "--step-tokens", "512")


def test_from_the_command_to_the_table(tmp_path, capsys):
    pytest.importorskip("transformers", minversion="5.23")

    out = tmp_path / "serving.csv"
    methods = ("sdpa", "flashmask", "flex_attention")  # the last of which has no continuous batching
    main([*SMALL, "--requests", "6", "--methods", *methods, "--out", str(out), "--commit", "abc"])
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["same"], row["runs"]) for row in rows] == [
        ("sdpa", "6", "1"),
        ("flashmask", "6", "1"),
        ("flex_attention", "", "0"),
    ]
    assert all(float(row["tokens_per_s"]) > 0 and int(row["prompt_tokens"]) > 1000 for row in rows[:2])
    assert "not supported for continuous batching" in rows[2]["note"]
    printed = capsys.readouterr().out
    assert "6 of 6" in printed
    assert "6 prompts of" in printed
    with pytest.raises(SystemExit, match="there are problems for 115 prompts"):
        main([*SMALL, "--requests", "200", "--out", str(out)])


def test_prompts_are_of_mixed_lengths_and_share_no_beginning():
    ids = serving.prompts(serving.SHOTS)
    lengths = [len(prompt) for prompt in ids]
    assert lengths == sorted(lengths)
    assert lengths[-1] > 5 * lengths[0]
    assert len({tuple(prompt[10:30]) for prompt in ids}) == len(ids)
