"""CSV files of benchmarks: what is none of theirs is refused with a message, whatever it is."""

import pytest

from hf_flashmask.bench import kernels, records
from hf_flashmask.cli import main

NOT_OURS = {
    "binary.csv": b"\x89PNG\r\n\x1a\n",
    "uneven.csv": b"peer,ms,tflops\nflashmask,1\n",
    "longer.csv": b"peer,ms\nflashmask,1,2\n",
    "foreign.csv": b"peer,price\nflashmask,cheap\n",
    "words.csv": ",".join(kernels.COLUMNS).encode() + b"\n" + b",".join([b"word"] * len(kernels.COLUMNS)) + b"\n",
    "sweep.csv": b"visible,price\n1,2\n",
    "empty.csv": b"",
    "folder.csv": None,
}


@pytest.fixture(params=NOT_OURS)
def path(tmp_path, request):
    path, content = tmp_path / request.param, NOT_OURS[request.param]
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("command", ["table", "plot"])
def test_foreign_files(path, command):
    if command == "plot":
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match=f"^flashmask: .*{path.name}"):
        main(["bench", command, str(path)])


def test_rows_are_not_appended_to_them(path):
    if path.name == "empty.csv":
        records.Log(path, ("a", "b")).append([{"a": 1, "b": 2}])
        assert records.read(path) == [{"a": "1", "b": "2"}]
        return
    with pytest.raises(records.Refusal, match="give another file"):
        records.Log(path, ("a", "b"))
