"""Training steps that ``flashmask bench train`` times: their rows, and their losses as TRL's trainers compute them.

The head is applied to the tokens that a loss reads alone, in chunks that are recomputed in the backward, as TRL's fused
head does; no ``[N, L, vocabulary]`` logits are made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .distributions import Question, Rows, token_rows

ANSWER = 512
BETA = 0.1
CHUNK = 4096  # tokens that the head sees at once
# Documents of packed rows as in shared measurements of FlexAttention and sdpa: four of unequal length.
DOCUMENTS = {8192: (4790, 1910, 370, 1122), 32768: (18779, 7637, 1480, 4872), 65536: (37431, 15274, 2960, 9871)}


@dataclass(frozen=True)
class Case:
    """One kind of step at one size: questions with answers, or documents of a packed row."""

    kind: str  # "dpo", "reward", "grpo" or "sft"
    questions: tuple[Question, ...] = ()
    documents: tuple[int, ...] = ()

    @property
    def shares(self) -> bool:
        return bool(self.questions)

    @property
    def tokens(self) -> int:
        """Of the rows as the trainer has them, padding left out."""
        return sum(self.documents) + sum(q.prompt * len(q.answers) + sum(q.answers) for q in self.questions)

    def scaled(self, divisor: int) -> Case:
        """Every length divided, at least 1: for trying things out."""

        def part(n: int) -> int:
            return max(1, n // divisor)

        questions = tuple(Question(part(q.prompt), tuple(map(part, q.answers))) for q in self.questions)
        return Case(self.kind, questions, tuple(map(part, self.documents)))


def _question(prompt: int, answers: int) -> tuple[Question, ...]:
    return (Question(prompt, (ANSWER,) * answers),)


CASES = {
    "dpo_2k": Case("dpo", _question(2048, 2)),
    "dpo_2k_4_pairs": Case("dpo", _question(2048, 2) * 4),
    "dpo_4k": Case("dpo", _question(4096, 2)),
    "dpo_8k": Case("dpo", _question(8192, 2)),
    "reward_4k": Case("reward", _question(4096, 6)),
    "grpo_4k": Case("grpo", _question(4096, 8)),
    "sft_8k": Case("sft", documents=DOCUMENTS[8192]),
    "sft_32k": Case("sft", documents=DOCUMENTS[32768]),
    "sft_64k": Case("sft", documents=DOCUMENTS[65536]),
}


class Step:
    """The loss of one batch of a case, of a PEFT model around a causal language model."""

    def __init__(self, case: Case, vocab_size: int, hidden: int, device: str, dtype: torch.dtype) -> None:
        self._case = case
        generator = torch.Generator().manual_seed(0)
        self._rows: Rows | None = None
        if case.shares:
            self._rows = Rows(*(t.to(device) for t in token_rows(list(case.questions), vocab_size, seed=0)))
        else:
            total = sum(case.documents)
            self._packed = torch.randint(1, vocab_size, (1, total), generator=generator).to(device)
            self._position_ids = torch.cat([torch.arange(n) for n in case.documents])[None].to(device)
        self._score = (torch.randn(hidden, generator=generator) / hidden**0.5).to(device, dtype)

    def __call__(self, model: Any) -> Tensor:
        losses: dict[str, Callable[[Any], Tensor]] = {
            "dpo": self._dpo, "reward": self._reward, "grpo": self._grpo, "sft": self._sft
        }  # fmt: skip
        return losses[self._case.kind](model)

    def _dpo(self, model: Any) -> Tensor:
        """The sigmoid loss; the reference is the model without its adapter."""
        with torch.no_grad(), model.disable_adapter():
            reference = self._answer_log_probs(model).sum(1)
        policy = self._answer_log_probs(model).sum(1)
        margin = (policy - reference).view(-1, 2)
        return -torch.nn.functional.logsigmoid(BETA * (margin[:, 0] - margin[:, 1])).mean()

    def _reward(self, model: Any) -> Tensor:
        """The first answer of a question is preferred to every other."""
        hidden = self._hidden(model)
        last = self._given.attention_mask.sum(1) - 1
        score = (hidden[torch.arange(len(last), device=last.device), last] @ self._score).float()
        score = score.view(len(self._case.questions), -1)
        return -torch.nn.functional.logsigmoid(score[:, :1] - score[:, 1:]).mean()

    def _grpo(self, model: Any) -> Tensor:
        """On-policy: the gradient of the log-probabilities, weighted by advantages of mean 0."""
        log_probs = self._answer_log_probs(model)
        advantages = torch.linspace(-1, 1, log_probs.shape[0], device=log_probs.device)[:, None]
        ratio = torch.exp(log_probs - log_probs.detach())
        mask = self._given.completion_mask[:, 1:]
        return -((ratio * advantages * mask).sum(1) / mask.sum(1)).mean()

    def _sft(self, model: Any) -> Tensor:
        hidden = backbone(model)(
            input_ids=self._packed, position_ids=self._position_ids, use_cache=False
        ).last_hidden_state
        # The last token of a document predicts nothing.
        inner = (self._position_ids[:, 1:] != 0)[0].nonzero()[:, 0]
        return -token_log_probs(_head(model), hidden[0, inner], self._packed[0, inner + 1]).mean()

    @property
    def _given(self) -> Rows:
        assert self._rows is not None
        return self._rows

    def _hidden(self, model: Any) -> Tensor:
        """``[N, L, H]``."""
        out = backbone(model)(
            input_ids=self._given.input_ids, attention_mask=self._given.attention_mask, use_cache=False
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def _answer_log_probs(self, model: Any) -> Tensor:
        """float32 ``[N, L - 1]``, 0 outside the answers."""
        hidden, ids = self._hidden(model)[:, :-1], self._given.input_ids[:, 1:]
        mask = self._given.completion_mask[:, 1:].bool()
        found = token_log_probs(_head(model), hidden[mask], ids[mask])
        return torch.zeros(mask.shape, device=ids.device).masked_scatter(mask, found)


def backbone(model: Any) -> Any:
    return model.get_base_model().model


def _head(model: Any) -> Tensor:
    weight: Tensor = model.get_base_model().lm_head.weight
    return weight


def token_log_probs(weight: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
    """float32 ``[T]`` of hidden states ``[T, H]`` under a head ``[vocabulary, H]``, which is recomputed in chunks."""

    def chunk(h: Tensor, y: Tensor) -> Tensor:
        logits = (h @ weight.T).float()
        return logits.gather(1, y[:, None])[:, 0] - logits.logsumexp(1)

    parts: Sequence[Tensor] = [
        checkpoint(chunk, h, y, use_reentrant=False)
        for h, y in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.cat(list(parts))
