"""Things with text on them for the ocr domain: sign, handwriting, plate and screen."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from distill.data.synthetic.canvas import Canvas, wrapped
from distill.data.synthetic.fonts import FAMILIES, Family, load_font
from distill.data.synthetic.rendered import Split, between, chance, pick, whole
from distill.data.synthetic.textures import Colour, paper
from distill.data.synthetic.words import Vocabulary

_SIGNS: tuple[tuple[Colour, Colour], ...] = (
    ((0, 100, 60), (250, 250, 250)),
    ((20, 70, 150), (250, 250, 250)),
    ((190, 30, 36), (252, 250, 248)),
    ((246, 198, 20), (20, 20, 20)),
    ((248, 248, 246), (24, 24, 28)),
    ((40, 40, 44), (246, 220, 130)),
    ((112, 74, 42), (248, 240, 214)),
)
_PLATES: tuple[tuple[Colour, Colour], ...] = (
    ((250, 250, 248), (22, 24, 40)),
    ((246, 206, 50), (20, 20, 20)),
    ((228, 236, 246), (26, 50, 120)),
    ((30, 34, 44), (240, 240, 236)),
    ((216, 232, 220), (20, 84, 54)),
)
_TERMINALS: tuple[tuple[Colour, tuple[Colour, ...]], ...] = (
    ((14, 16, 20), ((210, 214, 218), (120, 220, 120), (240, 200, 90), (110, 170, 250), (240, 110, 110))),
    ((4, 20, 8), ((90, 240, 120), (150, 255, 170), (60, 190, 90))),
    ((0, 43, 54), ((147, 161, 161), (181, 137, 0), (38, 139, 210), (133, 153, 0), (220, 80, 70))),
    ((250, 250, 248), ((40, 42, 54), (0, 92, 170), (170, 40, 60), (20, 120, 60))),
)
_PEN_INKS: tuple[Colour, ...] = ((24, 36, 110), (20, 20, 26), (30, 80, 160), (120, 24, 40), (50, 50, 60))
_GLYPH_PX = 72


def _font(rng: np.random.Generator, split: Split, *families: Family) -> str:
    return pick(rng, [name for family in families for name in FAMILIES[split][family]])


def sign(rng: np.random.Generator, words: Vocabulary, split: Split, pixels_per_unit: float) -> Canvas:
    """Draws a street or shop sign: few large words, a border, perhaps an arrow and bolts."""
    ground, ink = pick(rng, _SIGNS)
    width, height = between(rng, 380, 440), between(rng, 190, 380)
    canvas = Canvas(width, height, pixels_per_unit, ground)
    canvas.image.paste(paper(rng, max(canvas.image.size), ground, 0.05).crop((0, 0, *canvas.image.size)))
    edge = between(rng, 6, 12)
    canvas.rectangle((edge, edge, width - edge, height - edge), outline=ink, width=between(rng, 2, 5), radius=12)
    font = _font(rng, split, "bold", "heavy_serif")
    lines = [words.words(whole(rng, 1, 2)) for _ in range(whole(rng, 1, 3))]
    lines = [line.upper() if chance(rng, 0.6) else line.title() for line in lines]
    if chance(rng, 0.4):
        lines[-1] = pick(rng, (f"{whole(rng, 2, 90)} km", words.clock() + " - " + words.clock(), "EXIT", "OPEN"))
    arrow = chance(rng, 0.4)
    bottom = height - (60 if arrow else 24)
    step = (bottom - 24) / len(lines)
    for row, line in enumerate(lines):
        size = canvas.fitted(line, font, min(step * 0.72, 96), width - 2 * edge - 40)
        canvas.text((width / 2, 24 + (row + 0.5) * step), line, font, size, ink, "mm")
    if arrow:
        ends = [(width * 0.3, height - 42), (width * 0.7, height - 42)]
        start, end = ends if chance(rng, 0.5) else ends[::-1]
        canvas.arrow(start, end, ink, 6, 24)
    if chance(rng, 0.5):
        for x in (edge + 14, width - edge - 14):
            canvas.circle((x, edge + 14), 5, fill=(170, 170, 170), outline=(90, 90, 90), width=1)
    return canvas


@lru_cache(maxsize=1024)
def _pen_strokes(font: str, character: str) -> tuple[Image.Image, float]:
    """Returns the glyph's centre line as a mask, and its advance as a part of the glyph box.

    A type outline thinned to one pen's width looks written rather than set.
    """
    from skimage.morphology import skeletonize

    loaded = load_font(font, round(_GLYPH_PX * 0.62))
    glyph = Image.new("L", (_GLYPH_PX, _GLYPH_PX), 0)
    ImageDraw.Draw(glyph).text((_GLYPH_PX * 0.12, _GLYPH_PX * 0.72), character, font=loaded, fill=255, anchor="ls")
    thin = np.asarray(skeletonize(np.asarray(glyph.filter(ImageFilter.GaussianBlur(1.2))) > 100), np.uint8) * 255
    line = Image.fromarray(thin).filter(ImageFilter.MaxFilter(3)).filter(ImageFilter.GaussianBlur(1.1))
    return line.point([min(255, 2 * v) for v in range(256)]), loaded.getlength(character) / _GLYPH_PX


def _write_line(
    rng: np.random.Generator, canvas: Canvas, text: str, at: tuple[float, float], hand: tuple[str, float, float, Colour]
) -> None:
    """Writes one line glyph by glyph: each is slanted, turned, sized and shifted on its own."""
    font, size, slant, ink = hand
    k = canvas.pixels_per_unit
    box_px = round(size / 0.62 * k)
    x, phase, wave = at[0], between(rng, 0, 6.28), between(rng, 0.5, 2.0)
    for character in text:
        advance = size / 0.62 * (_pen_strokes(font, character)[1] if character != " " else 0.2)
        if character != " ":
            strokes = _pen_strokes(font, character)[0]
            grow, turn = between(rng, 0.9, 1.12), rng.normal(0, 0.05)
            lean, ratio = slant + rng.normal(0, 0.05), _GLYPH_PX / box_px / grow
            cos, sin = math.cos(turn) * ratio, math.sin(turn) * ratio
            middle = box_px / 2
            a, b, d, e = cos, cos * lean + sin, -sin, cos - sin * lean
            origin = _GLYPH_PX / 2
            matrix = (a, b, origin - (a + b) * middle, d, e, origin - (d + e) * middle)
            mask = strokes.transform((box_px, box_px), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
            drift = wave * math.sin(phase + x / 40) + float(rng.normal(0, 0.5))
            canvas.paste(mask, (round((x - 0.12 * size) * k), round((at[1] + drift - 1.16 * size) * k)), ink)
        x += advance * between(rng, 0.92, 1.05)
    canvas.text_lines.append((text, (at[0], at[1] - 0.85 * size, x, at[1] + 0.3 * size)))


def handwriting(rng: np.random.Generator, words: Vocabulary, split: Split, pixels_per_unit: float) -> Canvas:
    """Draws a note written by hand on plain, ruled or squared paper."""
    width, height = between(rng, 390, 440), between(rng, 220, 420)
    colour: Colour = pick(rng, ((253, 252, 246), (255, 247, 190), (240, 240, 238), (247, 238, 222)))
    canvas = Canvas(width, height, pixels_per_unit, colour)
    canvas.image.paste(paper(rng, max(canvas.image.size), colour).crop((0, 0, *canvas.image.size)))
    size = between(rng, 24, 40)
    step, rule = size * 1.5, pick(rng, ("ruled", "squared", "plain"))
    if rule != "plain":
        for row in range(1, int(height / step) + 1):
            canvas.line(((0, row * step + 12), (width, row * step + 12)), (170, 196, 222), 0.8)
    if rule == "squared":
        for column in range(int(width / step) + 1):
            canvas.line(((column * step, 0), (column * step, height)), (186, 206, 226), 0.8)
    font, slant, ink = _font(rng, split, "script"), between(rng, -0.1, 0.35), pick(rng, _PEN_INKS)
    text = " ".join((words.sentence(5, 9), words.date(), words.sentence(4, 9), words.clock(), words.words(9)))
    text = "".join(c for c in text if c.isalnum() or c in " .,:-/")
    rows = int((height - 12) / step)
    for row, line in enumerate(wrapped(canvas, text, font, size * 0.97, width - 54)[:rows]):
        at = (18 + between(rng, 0, 8), (row + 1) * step + 10)
        _write_line(rng, canvas, line, at, (font, size, slant, ink))
    return canvas


def plate(rng: np.random.Generator, words: Vocabulary, split: Split, pixels_per_unit: float) -> Canvas:
    """Draws a licence plate, a price label or a parcel label with one large code."""
    ground, ink = pick(rng, _PLATES)
    width, height = between(rng, 400, 440), between(rng, 110, 220)
    canvas = Canvas(width, height, pixels_per_unit, ground)
    canvas.image.paste(paper(rng, max(canvas.image.size), ground, 0.04).crop((0, 0, *canvas.image.size)))
    canvas.rectangle((4, 4, width - 4, height - 4), outline=ink, width=3, radius=10)
    font, small = _font(rng, split, "bold", "mono"), _font(rng, split, "sans")
    left = 14.0
    if chance(rng, 0.5):
        canvas.rectangle((6, 6, 46, height - 6), fill=(24, 56, 150))
        canvas.text((26, height - 24), words.code("A"), small, 22, (250, 250, 250), "mm")
        canvas.circle((26, height * 0.35), 11, outline=(250, 210, 40), width=3)
        left = 56.0
    code = words.code(pick(rng, ("AA 999 AA", "AAA 9999", "99-AA-99", "A 99999", "AAA-999", "9 AAA 999")))
    caption = pick(rng, (words.name().upper(), words.title(2, 3), f"{words.date()}  No. {words.code('99999')}"))
    size = canvas.fitted(code, font, height * 0.6, width - left - 24)
    middle = (left + width - 8) / 2
    canvas.text((middle, height * 0.44), code, font, size, ink, "mm")
    caption_size = canvas.fitted(caption, small, min(20, height * 0.14), width - left - 24)
    canvas.text((middle, height - 12), caption, small, caption_size, ink, "mb")
    for x in (left + 8, width - 18):
        if chance(rng, 0.5):
            canvas.circle((x, 16), 4, fill=(150, 150, 150))
    return canvas


def _screen_line(rng: np.random.Generator, words: Vocabulary) -> str:
    forms = (
        f"$ {words.word()} --{words.word()} {whole(rng, 1, 64)}",
        f"[{words.clock()}] {words.word()}: {words.words(3)}",
        f"ERROR {whole(rng, 100, 599)}: {words.words(2)}",
        f"{words.word()} = {words.word()}({whole(rng, 0, 99)})",
        f"for {words.word()[0]} in {words.word()}:",
        f"    return {words.word()} + {whole(rng, 1, 9)}",
        f"epoch {whole(rng, 1, 90):3d}  loss {rng.random() * 3:.4f}",
        f"{words.word()}.{pick(rng, ('py', 'txt', 'log', 'cfg'))}  {whole(rng, 10, 9999):5d} kB",
        f"# {words.words(3)}",
    )
    return pick(rng, forms)


def screen(rng: np.random.Generator, words: Vocabulary, split: Split, pixels_per_unit: float) -> Canvas:
    """Draws a window with terminal output or code, each line in one of the scheme's colours."""
    ground, inks = pick(rng, _TERMINALS)
    width, height = between(rng, 400, 445), between(rng, 280, 400)
    canvas = Canvas(width, height, pixels_per_unit, ground)
    font, size = _font(rng, split, "mono"), between(rng, 12, 19)
    canvas.rectangle((0, 0, width, 24), fill=(70, 72, 78))
    for number, colour in enumerate(((236, 96, 88), (244, 190, 80), (98, 200, 84))):
        canvas.circle((16 + 18 * number, 12), 5.5, fill=colour)
    canvas.text((width / 2, 12), words.title(1, 2), font, 12, (225, 225, 225), "mm")
    y = 34.0
    while y + size < height - 8:
        line = _screen_line(rng, words)
        number = f"{round((y - 34) / (size * 1.35)) + 1:2d} " if font != "cmtt10" or size < 15 else ""
        text = number + line
        fitted = canvas.fitted(text, font, size, width - 20)
        canvas.text((10, y), text, font, fitted, pick(rng, inks), "la")
        y += size * 1.35
    return canvas
