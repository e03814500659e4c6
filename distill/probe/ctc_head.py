"""The small reading head of the OCR probe: tokens of a line's columns to characters, trained by CTC.

A cell of a patch grid is wider than a character, so one linear layer makes several time steps of each cell, at about
the same pitch in pixels for every encoder; two short convolutions then see the neighbouring steps. CTC: Graves et al.
2006, "Connectionist temporal classification".

Legend: B lines, W columns of cells, F features of a column, T time steps, C channels of the head, K characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLANK = 0


@dataclass(frozen=True, eq=False)
class Columns:
    """Tokens of lines, as the head takes them.

    Attributes:
        features: `[B, W, F]`, float32; lines of fewer columns are padded.
        first_step: `[B]`, int64, time step of a line's left edge.
        num_steps: `[B]`, int64, time steps inside a line's box.
    """

    features: Tensor
    first_step: Tensor
    num_steps: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def rows(self, rows: Tensor) -> Columns:
        """Return some lines."""
        return Columns(self.features[rows], self.first_step[rows], self.num_steps[rows])

    def to(self, device: str) -> Columns:
        """Return the lines on a device."""
        return Columns(self.features.to(device), self.first_step.to(device), self.num_steps.to(device))


class ReadingHead(nn.Module):
    """Columns of tokens to log-probabilities of characters.

    Args:
        num_features: F.
        steps_per_column: time steps that each column of cells becomes.
        num_characters: K.
        width: C.
        kernel: time steps that a convolution sees.
    """

    def __init__(
        self, num_features: int, steps_per_column: int, num_characters: int, width: int = 64, kernel: int = 5
    ) -> None:
        super().__init__()
        self.width = width
        self.expand = nn.Linear(num_features, steps_per_column * width)
        self.first = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.second = nn.Conv1d(width, width, kernel, padding=kernel // 2)
        self.characters = nn.Conv1d(width, num_characters + 1, 1)

    def forward(self, lines: Columns) -> Tensor:
        """Return `[T, B, K + 1]`, float32 log-probabilities; T is the longest line's number of steps."""
        steps = self.expand(lines.features).unflatten(2, (-1, self.width)).flatten(1, 2)
        at = torch.arange(int(lines.num_steps.max()), device=steps.device)
        inside = at < lines.num_steps.unsqueeze(1)
        place = (lines.first_step.unsqueeze(1) + at).clamp_max(steps.shape[1] - 1)
        hidden = steps.gather(1, place.unsqueeze(2).expand(-1, -1, self.width))
        hidden = F.gelu(hidden).mul(inside.unsqueeze(2)).transpose(1, 2)
        hidden = hidden + F.gelu(self.first(hidden)) * inside.unsqueeze(1)
        hidden = hidden + F.gelu(self.second(hidden)) * inside.unsqueeze(1)
        return self.characters(hidden).permute(2, 0, 1).log_softmax(2)


def steps_needed(text: str) -> int:
    """Return the fewest time steps that CTC can write a text in: equal neighbours need a blank between them."""
    return len(text) + sum(a == b for a, b in pairwise(text))


def encode(texts: Sequence[str], characters: str) -> tuple[Tensor, Tensor]:
    """Return the characters of all texts in a row, int64, numbered from 1, and the length of each text."""
    number = {character: position for position, character in enumerate(characters, start=1)}
    labels = torch.tensor([number[character] for text in texts for character in text], dtype=torch.int64)
    return labels, torch.tensor([len(text) for text in texts], dtype=torch.int64)


def decode(log_probabilities: Tensor, num_steps: Tensor, characters: str) -> list[str]:
    """Return the texts that the likeliest path `[T, B, K + 1]` spells: repetitions are one, blanks are none."""
    best = log_probabilities.argmax(2).T.cpu()
    texts: list[str] = []
    for path, length in zip(best, num_steps.tolist(), strict=True):
        merged = torch.unique_consecutive(path[:length]).tolist()
        texts.append("".join(characters[label - 1] for label in merged if label != BLANK))
    return texts


def ctc_loss(log_probabilities: Tensor, num_steps: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
    """Return the mean over lines of the loss a character; an unreadable line counts nothing rather than infinity."""
    return F.ctc_loss(log_probabilities, labels, num_steps, lengths, blank=BLANK, zero_infinity=True)
