"""OCR probe: how well the characters of a line can be read from frozen patch tokens, by size of type.

The head sees only the cells under a line's box and is trained for a fixed number of epochs; the epoch with the lowest
character error rate on the select part is the one that is tested. The error rate is the number of edits (Levenshtein)
over the number of characters, so it may exceed 1.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from distill.errors import ConfigError, DataError
from distill.probe.blind import constant_text_error
from distill.probe.ctc_head import Columns, ReadingHead, ctc_loss, decode, encode, steps_needed
from distill.probe.drawn import map_batches, unit_scale
from distill.probe.drawn_text import TextSettings, draw_text_pages
from distill.probe.extraction import Extraction
from distill.probe.intervals import FloatArray
from distill.probe.protocol import IntArray, Split
from distill.probe.rung import PerImage, RungScore
from distill.probe.text_lines import TextPages

METRIC, PAGES_METRIC = "ocr_cer", "ocr_pages_cer"
"""Of drawn lines, and of the lines of pages that were given."""

STEP_PX = 4
"""Pitch of the head's time steps: the narrowest digits that are drawn are 10 px wide, of small print about 5."""

FIELD_PX = 64
MAX_ROWS = 4
"""A line's box is read at as many heights as cells go into 64 px, 2 to 4."""


@dataclass(frozen=True)
class Reading:
    """How the head is trained; the same for every encoder of a comparison.

    Attributes:
        epochs: passes over the fit lines, 1 at least.
        batch_lines: lines an optimiser step.
        lr: highest learning rate (AdamW, one cycle).
        weight_decay: of AdamW.
        epochs_per_check: the head is tried on the select lines this often.
    """

    epochs: int = 20
    batch_lines: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.01
    epochs_per_check: int = 4

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_lines, self.epochs_per_check) < 1 or self.lr <= 0:
            raise ConfigError(
                f"epochs {self.epochs}, batch_lines {self.batch_lines} and epochs_per_check {self.epochs_per_check} "
                f"must be 1 or more, and lr {self.lr} above 0."
            )


def ocr_scores(
    encoder: nn.Module,
    how: Extraction,
    seed: int,
    console: Console,
    pages: TextPages | None = None,
    reading: Reading | None = None,
) -> list[RungScore]:
    """Return the character error rate over all test lines, and at each size of type.

    Args:
        encoder: offers `distill.encoder.Encoder`.
        how: features are taken.
        seed: of drawn pages, of the split and of the head.
        console: for progress.
        pages: lines to read, see `distill.probe.text_lines.read_text_pages`; drawn ones when left out.
        reading: how the head is trained.

    Raises:
        ConfigError: the encoder refuses the pages' size.
        DataError: a line is too long to be written in its columns, a part of the split has no line, or a feature is
            not finite.
    """
    metric = METRIC if pages is None else PAGES_METRIC
    pages = pages or draw_text_pages(TextSettings(img_size_px=how.img_size_px, seed=seed))
    reading = reading or Reading()
    split = pages.split(seed)
    columns, steps_per_column = _columns(encoder, how, pages, console)
    _require_room(pages, columns.num_steps)
    texts = [line.text for line in pages.lines]
    fit = torch.from_numpy(split.fit)
    mean, std = unit_scale(columns.features[fit])
    columns = Columns((columns.features - mean) / std, columns.first_step, columns.num_steps)
    predictions, chosen = _train_and_read(columns, texts, split, steps_per_column, reading, seed, how.device, console)
    edits = edit_distances(predictions, [texts[row] for row in split.test])
    settings = {
        **chosen,
        "lines": {"fit": len(split.fit), "select": len(split.select), "test": len(split.test)},
        "steps_per_column": steps_per_column,
    }
    blind = constant_text_error([texts[row] for row in split.fit], [texts[row] for row in split.test], edit_distances)
    return _scores(metric, pages, split.test, edits, settings, blind)


def edit_distances(predictions: list[str], texts: list[str]) -> FloatArray:
    """Return the fewest insertions, deletions and substitutions that turn each prediction into its text, `[n]`."""
    from torchmetrics.functional.text import edit_distance  # imports transformers: seconds, unless it is needed

    return edit_distance(predictions, texts, reduction="none").double().numpy()


def _scores(
    metric: str, pages: TextPages, test: IntArray, edits: FloatArray, settings: dict[str, Any], blind: float
) -> list[RungScore]:
    lengths = np.asarray([len(pages.lines[row].text) for row in test], dtype=np.float64)
    sizes = np.asarray([pages.lines[row].size_px for row in test])
    scores: list[RungScore] = []
    for size in (None, *np.unique(sizes).tolist()):
        keep = np.ones(len(test), dtype=np.bool_) if size is None else sizes == size
        parts = PerImage(test[keep], edits[keep, None], lengths[keep, None], pages.groups[test[keep]])
        at = None if size is None else (pages.axis, float(size))
        title = "OCR, character error rate" if metric == METRIC else "OCR of the given pages, character error rate"
        floor = blind if size is None else None
        scores.append(RungScore(metric, title, "error_rate", parts, settings, at, data=pages.data, blind=floor))
    return scores


def _columns(encoder: nn.Module, how: Extraction, pages: TextPages, console: Console) -> tuple[Columns, int]:
    """Return the cells under each line, `[N, W, R * D]`, and the time steps that a column stands for."""
    lines_of: list[list[int]] = [[] for _ in range(len(pages.images))]
    for number, line in enumerate(pages.lines):
        lines_of[line.page].append(number)
    size = int(pages.images.shape[-1])
    found: dict[int, tuple[Tensor, int, int]] = {}
    steps = 1
    for rows, maps in map_batches(encoder, how, pages.images, console, "OCR: reading pages"):
        steps = max(1, round(size / maps.shape[2] / STEP_PX))
        for page, cells in zip(range(rows.start, rows.stop), maps, strict=True):
            for number in lines_of[page]:
                found[number] = _line_columns(cells, pages.lines[number].box, size, steps)
    ordered = [found[number] for number in range(len(pages.lines))]
    features = nn.utils.rnn.pad_sequence([entry[0] for entry in ordered], batch_first=True)
    first, count = (torch.tensor([entry[which] for entry in ordered]) for which in (1, 2))
    return Columns(features, first, count), steps


def _line_columns(
    cells: Tensor, box: tuple[float, float, float, float], size: int, steps: int
) -> tuple[Tensor, int, int]:
    """Return one line's columns `[W, R * D]`, its first time step among theirs, and its number of steps."""
    height, width, _ = cells.shape
    x0, x1 = (min(max(x * width / size, 0.0), float(width)) for x in (box[0], box[2]))
    left = min(int(x0), width - 1)
    right = max(left + 1, math.ceil(x1))
    num_rows = min(MAX_ROWS, max(2, round(height * FIELD_PX / size)))
    at = torch.linspace(0, 1, 2 * num_rows + 1)[1::2] * (box[3] - box[1]) + box[1]
    place = (at * height / size - 0.5).clamp(0, height - 1)
    above = place.long().clamp_max(max(height - 2, 0))
    share = (place - above)[:, None, None]
    below = (above + 1).clamp_max(height - 1)
    rows = cells[above, left:right] * (1 - share) + cells[below, left:right] * share
    first = round((x0 - left) * steps)
    count = max(1, min(math.ceil((x1 - x0) * steps), (right - left) * steps - first))
    return rows.permute(1, 0, 2).flatten(1), first, count


def _require_room(pages: TextPages, num_steps: Tensor) -> None:
    for line, steps in zip(pages.lines, num_steps.tolist(), strict=True):
        if steps_needed(line.text) > steps:
            raise DataError(
                f"The line {line.text!r} of page {line.page} needs {steps_needed(line.text)} time steps, and its "
                f"columns of tokens give {steps} (one for each {STEP_PX} px or so): it cannot be read. Use larger "
                "pages, or leave out lines that are this dense."
            )


def _train_and_read(
    columns: Columns,
    texts: list[str],
    split: Split,
    steps_per_column: int,
    reading: Reading,
    seed: int,
    device: str,
    console: Console,
) -> tuple[list[str], dict[str, Any]]:
    """Return the texts read from the test lines, and what was chosen on the select lines."""
    characters = "".join(sorted({character for row in split.fit for character in texts[row]}))
    # Initialisation reads torch's global generator: it is set for the head alone, and restored.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = ReadingHead(columns.features.shape[2], steps_per_column, len(characters)).to(device)
    fit, select, test = (torch.from_numpy(part) for part in (split.fit, split.select, split.test))
    trainer = _Trainer(head, columns, texts, characters, reading, device)
    shuffler = torch.Generator().manual_seed(seed)
    best, best_epoch, best_state = math.inf, 0, head.state_dict()
    epochs = range(1, reading.epochs + 1)
    for epoch in track(epochs, description="OCR: training the head", console=console, transient=True):
        trainer.train_epoch(fit[torch.randperm(len(fit), generator=shuffler)])
        if epoch % reading.epochs_per_check and epoch != reading.epochs:
            continue
        error = trainer.error_rate(select)
        if error < best:
            best, best_epoch, best_state = error, epoch, copy.deepcopy(head.state_dict())
    head.load_state_dict(best_state)
    return trainer.read(test), {"epoch": best_epoch, "select_cer": best, "characters": len(characters)}


class _Trainer:
    """A head with its optimiser and the lines it learns from."""

    def __init__(
        self, head: ReadingHead, columns: Columns, texts: list[str], characters: str, reading: Reading, device: str
    ) -> None:
        self.head, self.columns, self.texts = head, columns, texts
        self.characters, self.reading, self.device = characters, reading, device
        self.optimizer = torch.optim.AdamW(
            head.parameters(), lr=reading.lr, weight_decay=reading.weight_decay, fused=True
        )
        self.schedule: torch.optim.lr_scheduler.OneCycleLR | None = None

    def train_epoch(self, rows: Tensor) -> None:
        """Learn from lines once, in the order given."""
        batches = rows.split(self.reading.batch_lines)
        if self.schedule is None:
            total = len(batches) * self.reading.epochs
            self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, self.reading.lr, total_steps=total)
        for batch in batches:
            lines = self.columns.rows(batch).to(self.device)
            labels, lengths = encode([self.texts[row] for row in batch.tolist()], self.characters)
            loss = ctc_loss(self.head(lines), lines.num_steps, labels.to(self.device), lengths.to(self.device))
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()

    @torch.no_grad()
    def read(self, rows: Tensor) -> list[str]:
        """Return what the head reads."""
        texts: list[str] = []
        for batch in rows.split(256):
            lines = self.columns.rows(batch).to(self.device)
            texts.extend(decode(self.head(lines), lines.num_steps, self.characters))
        return texts

    def error_rate(self, rows: Tensor) -> float:
        """Return the character error rate over lines."""
        texts = [self.texts[row] for row in rows.tolist()]
        return float(edit_distances(self.read(rows), texts).sum()) / sum(map(len, texts))
