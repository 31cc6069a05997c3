"""What is said of one model type: a row of the table."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

# Statuses, best first.
OK = "ok"
REFUSED = "refused"
NOT_ROUTED = "not routed"
NOT_BUILDABLE = "not buildable"
MISMATCH = "mismatch"
FAILED = "failed"
STATUSES = {
    OK: "every case that applies equals eager",
    REFUSED: "flashmask raises an error that says why",
    NOT_ROUTED: "the model computes attention itself, or has none: no attention implementation can serve it",
    NOT_BUILDABLE: "no tiny random model of it runs with eager attention here",
    MISMATCH: "a case differs from eager, or raises an error that is not ours",
    FAILED: "the check itself crashed or ran out of time",
}


@dataclass
class Row:
    """A model type. Its cases are ok, n/a, refused, as sdpa, leaks as eager, mismatch or error; all but ok with a
    reason behind a colon."""

    kind: str
    type: str
    status: str = FAILED
    reason: str = ""
    model: str = ""
    cache: str = ""
    plain: str = ""
    left: str = ""
    right: str = ""
    packed: str = ""
    mask4d: str = ""
    dynamic: str = ""
    static: str = ""
    gradient: str = ""

    def cases(self) -> dict[str, str]:
        return {name: value for name in CASES if (value := getattr(self, name))}

    def settle(self) -> None:
        """The status that the cases add up to."""
        wrong = {name: v for name, v in self.cases().items() if v.startswith(("mismatch", "error"))}
        if wrong:
            self.status, self.reason = MISMATCH, "; ".join(f"{name}: {v}" for name, v in wrong.items())
        elif self.plain.startswith("refused"):
            self.status, self.reason = REFUSED, self.plain.partition(": ")[2]
        else:
            self.status = OK

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


COLUMNS = tuple(field.name for field in fields(Row))
CASES = ("plain", "left", "right", "packed", "mask4d", "dynamic", "static", "gradient")


def sentence(error: BaseException | None) -> str:
    """The first sentence of an error's message, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    first = re.split(r"(?<=[.;])\s", text, maxsplit=1)[0].rstrip(";.")
    first = re.sub(r"0x[0-9a-f]+", "0x...", first)
    return first if len(first) <= 200 else first[:197] + "..."


def origin(error: BaseException) -> str:
    """The file and line of Transformers that raised, or of the last frame."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append((Path(trace.tb_frame.f_code.co_filename), trace.tb_lineno))
        trace = trace.tb_next
    inside = [frame for frame in frames if "transformers" in frame[0].parts] or frames
    return f"{inside[-1][0].name}:{inside[-1][1]}" if inside else "?"


def ours(error: BaseException) -> bool:
    """Whether flashmask raised it on purpose."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_here = trace is not None and "hf_flashmask" in Path(trace.tb_frame.f_code.co_filename).parts
    return raised_here and isinstance(error, (NotImplementedError, ValueError, TypeError))
