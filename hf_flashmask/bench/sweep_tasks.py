"""Packed rows of ``flashmask bench sweep`` and the losses of its tasks, which are the paper's: SFT, LoRA, DPO and RM.

Every task packs questions into one row, each followed by its answers, and the loss reads the answers. A question with
one answer is a document (SFT, LoRA); with two or six, all answers see the question and none another answer (DPO, RM).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import distributions
from .distributions import Question
from .train_cases import BETA, token_log_probs

DRAWN = 101  # rows, of which the one with the median number of visible pairs is taken


@dataclass(frozen=True)
class Task:
    answers: int
    trained: str  # "all" parameters or those of "lora"
    least_tokens: int = distributions.LEAST_TOKENS  # of a question with its answers


TASKS = {
    "sft": Task(distributions.SFT_ANSWERS, "all"),
    "lora": Task(distributions.SFT_ANSWERS, "lora"),
    "dpo": Task(distributions.DPO_ANSWERS, "all"),
    "rm": Task(distributions.REWARD_ANSWERS, "all", least_tokens=512),
}


def questions(task: str, tokens: int) -> tuple[Question, ...]:
    """The questions of a row: of those drawn, the row in the middle by what attention computes."""
    kind = TASKS[task]
    most = distributions.MOST_DOCUMENTS
    if task == "rm" and tokens <= 8192:  # as the paper has it: six answers need room
        most = 3 if tokens <= 4096 else 4

    def draw(seed: int) -> tuple[Question, ...]:
        lengths = distributions.documents(tokens, seed, most, min(kind.least_tokens, tokens))
        return tuple(distributions.question(n, kind.answers, seed + i) for i, n in enumerate(lengths))

    drawn = sorted((draw(seed) for seed in range(DRAWN)), key=visible_pairs)
    return drawn[DRAWN // 2]


def visible_pairs(row: Sequence[Question]) -> int:
    """Pairs of a query and a key that it sees."""
    triangles = sum(n * (n + 1) // 2 for q in row for n in (q.prompt, *q.answers))
    return triangles + sum(q.prompt * sum(q.answers) for q in row)


class PackedRow:
    """Token ids of one row and where its answers are."""

    def __init__(self, row: Sequence[Question], vocab_size: int, device: str, seed: int = 0) -> None:
        self.lengths = [[q.prompt, *q.answers] for q in row]
        self.tokens = sum(q.total for q in row)
        self.visible = visible_pairs(row) / self.tokens**2
        generator = torch.Generator().manual_seed(seed)
        self.input_ids = torch.randint(1, vocab_size, (1, self.tokens), generator=generator).to(device)
        positions, source, target, answer, last = [], [], [], [], list[int]()
        at = 0
        for q in row:
            positions.append(torch.arange(q.prompt))
            end_of_prompt = at + q.prompt - 1
            at += q.prompt
            for n in q.answers:
                positions.append(torch.arange(q.prompt, q.prompt + n))
                own = torch.arange(at, at + n)
                # The end of the question predicts the first token of each answer.
                source += [torch.tensor([end_of_prompt]), own[:-1]]
                target.append(own)
                answer.append(torch.full((n,), len(last)))
                at += n
                last.append(at - 1)
        self.position_ids = torch.cat(positions)[None].to(device)
        self.source, self.target, self.answer = (torch.cat(parts).to(device) for parts in (source, target, answer))
        self.last = torch.tensor(last, device=device)
        ends = torch.tensor([0, *(sum(lengths) for lengths in self.lengths)]).cumsum(0)
        self.cu_seqlens = ends.to(device, torch.int32)
        self.longest = max(sum(lengths) for lengths in self.lengths)

    def log_probs(self, weight: Tensor, hidden: Tensor) -> Tensor:
        """float32 ``[T]`` of the answers' tokens, from hidden states ``[1, S, H]``."""
        return token_log_probs(weight, hidden[0, self.source], self.input_ids[0, self.target])


Hidden = Callable[[Any], Tensor]  # hidden states [1, S, H] of a model on the row


def loss(task: str, row: PackedRow, hidden: Hidden, model: Any, reference: Any | None) -> Tensor:
    """Of one step. ``reference`` is DPO's frozen model."""
    if task == "rm":
        return _reward(row, hidden, model)
    weight = model.get_output_embeddings().weight
    if task == "dpo":
        return _dpo(row, hidden, model, weight, reference)
    return -row.log_probs(weight, hidden(model)).mean()


def _dpo(row: PackedRow, hidden: Hidden, model: Any, weight: Tensor, reference: Any) -> Tensor:
    """The sigmoid loss, the first answer preferred to the second, and the first one's negative log-likelihood beside
    it: a policy that still equals its reference has ln 2 in the former whatever attention computes."""
    with torch.no_grad():
        base = row.log_probs(reference.get_output_embeddings().weight, hidden(reference))
    policy = row.log_probs(weight, hidden(model))
    count = len(row.last)
    ratio = torch.zeros(count, device=policy.device).index_add(0, row.answer, policy - base).view(-1, 2)
    chosen = row.answer % 2 == 0
    preference = torch.nn.functional.logsigmoid(BETA * (ratio[:, 0] - ratio[:, 1])).mean()
    return -preference - (policy * chosen).sum() / chosen.sum()


def _reward(row: PackedRow, hidden: Hidden, model: Any) -> Tensor:
    """The first answer of a question is preferred to every other."""
    score = model.score(hidden(model)[0, row.last]).float().view(-1, TASKS["rm"].answers)
    return -torch.nn.functional.logsigmoid(score[:, :1] - score[:, 1:]).mean()
