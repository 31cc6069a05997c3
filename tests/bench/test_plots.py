"""Pictures of ``bench sweep``, ``longest``, ``infer`` and ``serving``: what is drawn is what was measured."""

import pytest

from hf_flashmask.bench import (
    infer,
    longest,
    plots,
    plots_inference,
    plots_lengths,
    records,
    serving,
    sweep,
    sweep_table,
)

pytest.importorskip("matplotlib")


def rows(columns, common, *given):
    return [dict.fromkeys(columns, "") | common | {k: str(v) for k, v in row.items()} for row in given]


def lines(ax):
    """Points of every line that has some, by colour; crosses apart."""
    drawn = [line for line in ax.lines if len(line.get_xdata())]
    return {
        (line.get_color(), "x" if line.get_marker() == "X" else "-"): list(
            zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True)
        )
        for line in drawn
    }


def test_sweep():
    common = dict.fromkeys(("gpu", *sweep.SETUP), "1")
    given = rows(
        sweep.COLUMNS, common,
        {"task": "lora", "method": "sdpa", "tokens": 4096, "seconds": 9, "tokens_per_s": 9, "layers": 2},
        {"task": "dpo", "method": "flash_varlen", "tokens": 4096, "note": "refused: no"},
        {"task": "dpo", "method": "flashmask", "tokens": 8192, "seconds": 1, "tokens_per_s": 3000, "peak_mib": 2048},
        {"task": "dpo", "method": "flashmask", "tokens": 4096, "seconds": 1, "tokens_per_s": 4000, "peak_mib": 1024},
        {"task": "dpo", "method": "sdpa", "tokens": 4096, "seconds": 1, "tokens_per_s": 2000, "peak_mib": 3072},
        {"task": "dpo", "method": "sdpa", "tokens": 8192, "note": "out of memory"},
    )  # fmt: skip
    figure = plots_lengths.sweep(given)
    speed, memory = figure.axes  # the two layers are another sweep, and of this one there is one task
    assert speed.get_title() == "DPO, all parameters"
    ours, theirs = "#0072b2", "#e69f00"
    assert lines(speed)[ours, "-"] == [(4096, 4.0), (8192, 3.0)]
    assert lines(speed)[theirs, "-"] == [(4096, 2.0)]
    assert lines(memory)[ours, "-"] == [(4096, 1.0), (8192, 2.0)]
    assert [x for x, _ in lines(memory)[theirs, "x"]] == [8192]
    assert [text.get_text() for text in figure.legends[0].texts] == ["sdpa", "flashmask", "out of memory"]
    assert sweep_table.markdown(given).splitlines()[2:] == [
        "| DPO, 4,096 tokens | 2,000 | - | - | **4,000** | 2.00x, -, - |",
        "| DPO, 8,192 tokens | out of memory | - | - | **3,000** | -, -, - |",
    ]
    with pytest.raises(records.Refusal, match="nothing was timed"):
        sweep_table.markdown(given[1:2])


def test_longest():
    common = dict.fromkeys(plots_lengths._LONGEST_SETUP, "1") | {"method": "sdpa"}
    no = {"fits": "no", "note": "OutOfMemoryError: CUDA out of memory."}
    given = rows(
        longest.COLUMNS, common,
        {"tokens": 32768, "fits": "yes", "peak_mib": 1024}, {"tokens": 131072} | no, {"tokens": 65536} | no,
    )  # fmt: skip
    (ax,) = plots_lengths.longest(given).axes
    assert lines(ax)["#e69f00", "-"] == [(32768, 1.0)]
    assert [x for x, _ in lines(ax)["#e69f00", "x"]] == [65536]


def test_infer_and_serving(tmp_path):
    common = {"gpu": "GPU", "copy_gb_per_s": "1000", "heads": "2", "kv_heads": "1", "head_dim": "64"}
    decode = {"case": "decode_padded", "batch": 4}
    given = rows(
        infer.COLUMNS, common,
        {**decode, "kv_len": 2048, "method": "flashmask", "ms": 1, "gb_per_s": 250},
        {**decode, "kv_len": 8192, "method": "flashmask", "ms": 2, "gb_per_s": 500},
        {**decode, "kv_len": 2048, "method": "sdpa_mask", "ms": 3, "gb_per_s": 80},
        {**decode, "kv_len": 2048, "method": "sdpa_mask_repeated", "ms": 9, "gb_per_s": 20},
        {**decode, "kv_len": 8192, "method": "sdpa_mask", "note": "OutOfMemoryError"},
        {"case": "prefill_window", "batch": 1, "kv_len": 32, "method": "sdpa", "ms": 2, "tokens_per_s": 100},
        {"case": "prefill_window", "batch": 1, "kv_len": 32, "method": "flashmask", "ms": 1, "tokens_per_s": 250},
    )  # fmt: skip
    shares, speeds, bars = plots_inference.infer(given).axes
    found = [[tuple(p) for p in zip(line.get_xdata(), line.get_ydata(), strict=True)] for line in shares.lines]
    assert found[0] == [(2048, 0.25), (8192, 0.5)]
    assert [tuple(p) for p in speeds.lines[0].get_xydata()] == [(2048, 3.0)]
    assert [patch.get_height() for patch in bars.patches] == [1.0, 2.5]

    common = dict.fromkeys(plots_inference._SERVING_SETUP, "1")
    given = rows(
        serving.COLUMNS, common,
        {"method": "sdpa", "tokens_per_s": 20, "cuda_graphs": "none", "peak_mib": 2048},
        {"method": "flashmask", "tokens_per_s": 90, "cuda_graphs": "decode"},
    )  # fmt: skip
    (ax,) = plots_inference.serving(given).axes
    assert [patch.get_height() for patch in ax.patches] == [20, 90]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["sdpa", "flashmask\nCUDA graphs of decoding"]

    log = records.Log(tmp_path / "serving.csv", serving.COLUMNS)
    log.append(rows(serving.COLUMNS, common, {"method": "sdpa", "note": "RuntimeError"}))
    with pytest.raises(records.Refusal, match="was timed; its notes say why"):
        plots.plot(tmp_path / "serving.csv", tmp_path / "serving.png")
    log.append(given)
    plots.plot(tmp_path / "serving.csv", tmp_path / "serving.png")
    assert (tmp_path / "serving.png").read_bytes().startswith(b"\x89PNG")
