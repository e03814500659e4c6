"""Printed pages for the ocr domain: document, receipt, form and cover."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from distill.data.synthetic.canvas import Canvas, wrapped
from distill.data.synthetic.fonts import FAMILIES, Family
from distill.data.synthetic.rendered import Split, between, chance, pick, whole
from distill.data.synthetic.textures import Colour, paper
from distill.data.synthetic.words import Vocabulary

_PAPERS: tuple[Colour, ...] = ((252, 251, 247), (245, 240, 226), (238, 238, 240), (250, 246, 234), (232, 226, 205))
_INKS: tuple[Colour, ...] = ((20, 20, 22), (45, 40, 38), (25, 30, 70), (60, 60, 64))
_COVERS: tuple[tuple[Colour, Colour, Colour], ...] = (
    ((24, 48, 82), (244, 236, 214), (214, 164, 60)),
    ((122, 30, 36), (250, 244, 230), (232, 190, 120)),
    ((232, 222, 196), (40, 36, 34), (176, 64, 40)),
    ((28, 76, 62), (240, 240, 226), (222, 134, 82)),
    ((245, 245, 243), (24, 24, 28), (30, 110, 170)),
    ((240, 186, 60), (42, 32, 28), (150, 40, 44)),
    ((58, 46, 82), (236, 230, 246), (236, 110, 120)),
)


def _font(rng: np.random.Generator, split: Split, *families: Family) -> str:
    return pick(rng, [name for family in families for name in FAMILIES[split][family]])


def _sheet(rng: np.random.Generator, width: float, height: float, pixels_per_unit: float, colour: Colour) -> Canvas:
    canvas = Canvas(width, height, pixels_per_unit, colour)
    side = max(canvas.image.size)
    canvas.image.paste(paper(rng, side, colour).crop((0, 0, *canvas.image.size)))
    return canvas


def _column(
    canvas: Canvas, text: str, font: str, size: float, box: tuple[float, float, float, float], ink: Colour
) -> float:
    """Writes wrapped text into the box (x0, y0, x1, y1) and returns the y below its last line."""
    y = box[1]
    for line in wrapped(canvas, text, font, size, box[2] - box[0]):
        if y + size > box[3]:
            break
        canvas.text((box[0], y), line, font, size, ink, "la")
        y += size * 1.32
    return y


def document(rng: np.random.Generator, words: Vocabulary, split: Split, pixels_per_unit: float) -> Canvas:
    """Draws a page of headed paragraphs in one or two columns."""
    width, height = between(rng, 330, 440), between(rng, 400, 470)
    canvas = _sheet(rng, width, height, pixels_per_unit, pick(rng, _PAPERS))
    ink, body = pick(rng, _INKS), _font(rng, split, "serif", "sans")
    head = _font(rng, split, "bold", "heavy_serif")
    margin, size = between(rng, 22, 40), between(rng, 9.5, 15)
    title = words.title(2, 4)
    big = canvas.fitted(title, head, between(rng, 18, 26), width - 2 * margin)
    anchor, x = ("ma", width / 2) if chance(rng, 0.5) else ("la", margin)
    canvas.text((x, margin * 0.8), title, head, big, ink, anchor)
    top = margin * 0.8 + big * 1.5
    byline = f"{words.name()} {words.name()}, {words.date()}"
    canvas.text((x, top), byline, body, size * 0.95, ink, anchor)
    top += size * 2
    columns = 2 if size < 12 and chance(rng, 0.5) else 1
    gap = 16
    column_width = (width - 2 * margin - gap * (columns - 1)) / columns
    for column in range(columns):
        left, y = margin + column * (column_width + gap), top
        while y < height - margin - 2 * size:
            if chance(rng, 0.3) and y + 4 * size < height - margin:
                heading = words.title(1, 2)
                canvas.text((left, y), heading, head, size * 1.15, ink, "la")
                y += size * 1.7
            box = (left, y, left + column_width, height - margin)
            y = _column(canvas, words.paragraph(whole(rng, 1, 4)), body, size, box, ink) + size * 0.6
    if chance(rng, 0.6):
        canvas.text((width / 2, height - 8), str(whole(rng, 1, 480)), body, size * 0.9, ink, "mb")
    return canvas


def receipt(rng: np.random.Generator, words: Vocabulary, split: Split, pixels_per_unit: float) -> Canvas:
    """Draws a shop receipt: header, items with prices, total."""
    items = whole(rng, 4, 10)
    size = between(rng, 12, 15)
    width = between(rng, 230, 300)
    canvas = _sheet(rng, width, size * 1.45 * (items + 12), pixels_per_unit, pick(rng, _PAPERS[:3]))
    font, ink, sign = _font(rng, split, "mono"), pick(rng, _INKS), pick(rng, ("$", "", "EUR ", "GBP "))
    step, margin = size * 1.4, 14.0
    y = size
    header = words.title(1, 2).upper()
    canvas.text((width / 2, y), header, font, canvas.fitted(header, font, size * 1.6, width - 30), ink, "ma")
    y += step * 1.5
    for line in (words.street(), f"Tel {words.code('999 999 9999')}", f"{words.date()}  {words.clock()}"):
        canvas.text((width / 2, y), line, font, canvas.fitted(line, font, size, width - 20), ink, "ma")
        y += step
    canvas.line(((margin, y + 3), (width - margin, y + 3)), ink, 1.0, dash=4)
    y += step * 0.7
    cents = 0
    for _ in range(items):
        count, price = whole(rng, 1, 4), whole(rng, 49, 4999)
        cents += count * price
        name = f"{count} {words.words(whole(rng, 1, 2)).title()}"
        canvas.text((margin, y), name, font, canvas.fitted(name, font, size, width * 0.66), ink, "la")
        canvas.text((width - margin, y), f"{count * price / 100:.2f}", font, size, ink, "ra")
        y += step
    canvas.line(((margin, y + 3), (width - margin, y + 3)), ink, 1.0, dash=4)
    y += step * 0.7
    tax = round(cents * 0.08)
    for name, value in (("Subtotal", cents), ("Tax 8%", tax), ("TOTAL", cents + tax)):
        canvas.text((margin, y), name, font, size * (1.15 if name == "TOTAL" else 1), ink, "la")
        canvas.text((width - margin, y), f"{sign}{value / 100:.2f}", font, size, ink, "ra")
        y += step * 1.05
    _barcode(rng, canvas, (width * 0.2, y + 4, width * 0.8, y + step * 1.6), ink)
    canvas.text((width / 2, y + step * 1.9), "Thank you", font, size, ink, "ma")
    return canvas


def _barcode(rng: np.random.Generator, canvas: Canvas, box: tuple[float, float, float, float], ink: Colour) -> None:
    x = box[0]
    while x < box[2]:
        bar = pick(rng, (0.8, 1.2, 2.0, 3.0))
        canvas.rectangle((x, box[1], min(x + bar, box[2]), box[3]), fill=ink)
        x += bar + pick(rng, (1.0, 1.8, 2.6))


def form(rng: np.random.Generator, words: Vocabulary, split: Split, pixels_per_unit: float) -> Canvas:
    """Draws a form: labelled fields that are partly filled in, check boxes and a small table."""
    width, height = between(rng, 360, 440), between(rng, 400, 450)
    canvas = _sheet(rng, width, height, pixels_per_unit, pick(rng, _PAPERS))
    ink, font = pick(rng, _INKS), _font(rng, split, "sans", "serif")
    head, pen = _font(rng, split, "bold"), _font(rng, split, "script")
    pen_ink: Colour = pick(rng, ((30, 50, 140), (25, 25, 30), (20, 80, 150)))
    band: Colour = pick(rng, ((220, 228, 238), (228, 228, 224), (214, 230, 218), (240, 224, 210)))
    margin, y = 20.0, 14.0
    canvas.rectangle((margin, y, width - margin, y + 30), fill=band, outline=ink, width=1)
    title = words.title(2, 3).upper()
    canvas.text((width / 2, y + 15), title, head, canvas.fitted(title, head, 17, width - 60), ink, "mm")
    y += 44
    labels = ("Name", "Address", "Date of birth", "Reference no.", "Telephone", "City")
    values = (
        f"{words.name()} {words.name()}",
        words.street(),
        words.date(),
        words.code("AA-99999"),
        words.code("999 999 999"),
        words.name(),
    )
    for row in rng.permutation(len(labels))[: whole(rng, 4, 5)]:
        canvas.text((margin, y + 10), labels[row], font, 12, ink, "lm")
        canvas.line(((margin + 100, y + 17), (width - margin, y + 17)), ink, 1)
        if chance(rng, 0.8):
            size = canvas.fitted(values[row], pen, 16, width - 2 * margin - 110)
            canvas.text((margin + 108, y + 8), values[row], pen, size, pen_ink, "lm")
        y += 27
    y += 4
    for column in range(3):
        left = margin + column * (width - 2 * margin) / 3
        canvas.rectangle((left, y, left + 12, y + 12), outline=ink, width=1)
        if chance(rng, 0.5):
            canvas.line(((left + 2, y + 6), (left + 5, y + 10), (left + 12, y - 1)), pen_ink, 1.8)
        canvas.text((left + 18, y + 6), words.word().capitalize(), font, 12, ink, "lm")
    _grid(rng, canvas, words, (margin, y + 26, width - margin, height - 18), (font, head, pen), (ink, band, pen_ink))
    return canvas


def _grid(
    rng: np.random.Generator,
    canvas: Canvas,
    words: Vocabulary,
    box: tuple[float, float, float, float],
    fonts: tuple[str, str, str],
    colours: tuple[Colour, Colour, Colour],
) -> None:
    ink, band, pen_ink = colours
    columns = whole(rng, 3, 4)
    rows = max(3, min(7, int((box[3] - box[1]) / 24)))
    step_x, step_y = (box[2] - box[0]) / columns, (box[3] - box[1]) / rows
    canvas.rectangle((box[0], box[1], box[2], box[1] + step_y), fill=band)
    for row in range(rows + 1):
        canvas.line(((box[0], box[1] + row * step_y), (box[2], box[1] + row * step_y)), ink, 1)
    for column in range(columns + 1):
        canvas.line(((box[0] + column * step_x, box[1]), (box[0] + column * step_x, box[3])), ink, 1)
    for row in range(rows):
        for column in range(columns):
            centre = (box[0] + (column + 0.5) * step_x, box[1] + (row + 0.5) * step_y)
            if row and column and chance(rng, 0.2):
                continue
            filled = words.price(999) if column else words.word()
            text = filled if row else words.word().capitalize()
            font = fonts[1] if row == 0 else fonts[2] if column else fonts[0]
            size = canvas.fitted(text, font, 13, step_x - 8)
            canvas.text(centre, text, font, size, pen_ink if row and column else ink, "mm")


def cover(rng: np.random.Generator, words: Vocabulary, split: Split, pixels_per_unit: float) -> Canvas:
    """Draws a book cover or a headline page: large title, ornament, author."""
    width, height = between(rng, 300, 400), between(rng, 400, 450)
    ground, ink, accent = pick(rng, _COVERS)
    canvas = _sheet(rng, width, height, pixels_per_unit, ground)
    head, small = _font(rng, split, "bold", "heavy_serif", "serif"), _font(rng, split, "serif", "sans")
    y = between(rng, 40, 80)
    for line in wrapped(canvas, words.title(2, 5), head, 40, width - 50):
        size = canvas.fitted(line, head, 40, width - 50)
        canvas.text((width / 2, y), line, head, size, ink, "ma")
        y += size * 1.2
    subtitle = words.sentence(3, 5).rstrip(".")
    canvas.text((width / 2, y + 10), subtitle, small, canvas.fitted(subtitle, small, 17, width - 60), accent, "ma")
    _ornament(rng, canvas, accent, y + 40)
    author = f"{words.name()} {words.name()}"
    canvas.text((width / 2, height - 58), author, small, canvas.fitted(author, small, 22, width - 60), ink, "mm")
    imprint = f"{words.name()} Press {whole(rng, 1950, 2031)}"
    canvas.text((width / 2, height - 28), imprint, small, 12, ink, "mm")
    return canvas


def _ornament(rng: np.random.Generator, canvas: Canvas, accent: Colour, top: float) -> None:
    """Draws a figure between `top` and the author's name, or a frame if there is no room."""
    width, bottom = canvas.width, canvas.height - 80
    room = bottom - top
    style = whole(rng, 0, 4) if room > 40 else 0
    if style == 0:
        canvas.rectangle((14, 14, width - 14, canvas.height - 14), outline=accent, width=3)
        canvas.rectangle((20, 20, width - 20, canvas.height - 20), outline=accent, width=1)
    elif style == 1:
        for ring in range(1, whole(rng, 3, 6)):
            canvas.circle((width / 2, top + room / 2), room / 2 * ring / 5, outline=accent, width=3)
    elif style == 2:
        for stripe in range(int(room / 14)):
            canvas.rectangle((width * 0.2, top + stripe * 14, width * 0.8, top + stripe * 14 + 6), fill=accent)
    elif style == 3:
        points = [(between(rng, 0.12, 0.88) * width, between(rng, top, bottom)) for _ in range(8)]
        for start, end in pairwise(points):
            canvas.line((start, end), accent, 2)
            canvas.circle(start, 5, fill=accent)
    else:
        base = [(width * (0.1 + 0.8 * i / 8), between(rng, top, bottom - 4)) for i in range(9)]
        canvas.polygon([(width * 0.1, bottom), *base, (width * 0.9, bottom)], fill=accent)
