"""Text for the images: words, names, numbers, prices and dates, from lists that the splits do not share."""

from __future__ import annotations

import numpy as np

from distill.data.synthetic.rendered import Split, chance, pick, whole


def _listed(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split()))


_TRAIN_WORDS = _listed(
    """
    able account active air amber answer apple april arrive autumn balance basket beach bell bicycle blanket blue
    board bottle branch bread bridge bright brother budget build butter cabin camera candle carpet castle cedar
    chair change cherry circle city clean clear clock cloud coast coffee colour copper corner cotton country cousin
    cream cycle daily dance deliver desk dinner doctor dragon dream drive early earth east effort empty engine
    evening every extra fabric family famous farmer february field figure final finger flight floor forest fresh
    friend frozen future garden gather gentle glass golden good grand green ground group guest half hammer happy
    harbour hearth heavy hidden history honey house idea indoor inside iron island january jacket journey juice
    kitchen ladder large later leather lemon letter library light linen listen little local logic lunch machine
    maple margin market master meadow member metal middle minute mirror moment morning mountain music narrow nature
    never night noble north notice number nutmeg ocean office olive open orange order other outdoor oxygen paint
    paper parcel pattern pepper picture pillow planet pocket polish pond porch potato powder press pretty price
    """
)
_HELDOUT_WORDS = _listed(
    """
    abroad absent acorn advice agree almond amount anchor animal arrow artist august bamboo banner barrel beetle
    berry between biscuit border bounce brass breeze brick bronze brush bucket bundle burrow cactus canal canyon
    caramel cargo carrot cellar channel chapter cheese chorus cinema clever clover collect comet compass concert
    cottage course cricket crystal curtain december delta desert detail diary dollar double eagle earning echo
    eleven ember emerald enough equal escape estate event expert falcon feather february ferry fiddle filter flame
    flock fossil fragile frost gallery garlic ginger glacier globe grain granite grape gravel guitar habit hazel
    helmet hollow horizon hotel hunter igloo import index ink invent ivory jasmine jelly jewel jungle kernel kettle
    kingdom lagoon lantern lavender lecture ledger legend liberty lizard lobster magnet mango marble marine meteor
    mineral mosaic mustard needle nickel novel nurse oatmeal object october onion orchard oyster palace panel pebble
    pelican pencil phrase piano pigeon pioneer plaster plenty poem prairie prism pulse puzzle quartz quiet rabbit
    radish raven ribbon ripple river rocket rustic saddle salmon sandal scarlet season shadow shelter shovel signal
    silver
    """
)
_WORDS: dict[Split, tuple[str, ...]] = {
    "train": _TRAIN_WORDS,
    # A word of both lists stays a training word.
    "heldout": tuple(word for word in _HELDOUT_WORDS if word not in _TRAIN_WORDS),
}
_SYLLABLES: dict[Split, tuple[str, ...]] = {
    "train": _listed("ba bel cor dan del far gal han kel lan mar mon nor pel ran ros sal tan tor vel wen win"),
    "heldout": _listed("bri cas dor el fen gri hol is jo kir lu mir no ost pra quin ri sor tis ul ver zan"),
}
_SUFFIXES: dict[Split, tuple[str, ...]] = {
    "train": ("ton", "ley", "ford", "berg", "man", "son"),
    "heldout": ("wick", "dale", "stad", "ville", "ner", "sen"),
}
_STREETS: dict[Split, tuple[str, ...]] = {
    "train": ("Street", "Road", "Lane", "Square"),
    "heldout": ("Avenue", "Drive", "Court", "Way"),
}
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class Vocabulary:
    """A source of short texts for one image.

    Args:
        rng: the sample's generator.
        split: which of the two disjoint word lists to draw from.
    """

    def __init__(self, rng: np.random.Generator, split: Split) -> None:
        self._rng = rng
        self._split: Split = split

    def word(self) -> str:
        """Returns one lower-case word; one in twelve is made of syllables."""
        if chance(self._rng, 1 / 12):
            return "".join(pick(self._rng, _SYLLABLES[self._split]) for _ in range(whole(self._rng, 2, 3)))
        return pick(self._rng, _WORDS[self._split])

    def words(self, count: int) -> str:
        """Returns `count` lower-case words with single spaces."""
        return " ".join(self.word() for _ in range(count))

    def title(self, low: int = 2, high: int = 4) -> str:
        """Returns low to high words with capital initials."""
        return self.words(whole(self._rng, low, high)).title()

    def name(self) -> str:
        """Returns an invented proper name."""
        stem = "".join(pick(self._rng, _SYLLABLES[self._split]) for _ in range(whole(self._rng, 1, 2)))
        return (stem + pick(self._rng, _SUFFIXES[self._split])).capitalize()

    def sentence(self, low: int = 5, high: int = 12) -> str:
        """Returns a sentence of low to high words, now and then with a number or a comma."""
        parts = [self.word() for _ in range(whole(self._rng, low, high))]
        if chance(self._rng, 0.3):
            parts[whole(self._rng, 1, len(parts) - 1)] = str(whole(self._rng, 2, 1999))
        if chance(self._rng, 0.4):
            parts[len(parts) // 2] += ","
        return " ".join(parts).capitalize() + "."

    def paragraph(self, count: int) -> str:
        """Returns `count` sentences."""
        return " ".join(self.sentence() for _ in range(count))

    def street(self) -> str:
        """Returns an invented street address."""
        return f"{whole(self._rng, 1, 299)} {self.word().capitalize()} {pick(self._rng, _STREETS[self._split])}"

    def price(self, high: float = 99.0) -> str:
        """Returns an amount with two decimals and no currency sign."""
        return f"{self._rng.uniform(0.5, high):.2f}"

    def date(self) -> str:
        """Returns a date in one of four usual notations."""
        day, month, year = whole(self._rng, 1, 28), whole(self._rng, 1, 12), whole(self._rng, 1990, 2031)
        forms = (
            f"{day:02d}/{month:02d}/{year}",
            f"{year}-{month:02d}-{day:02d}",
            f"{day} {_MONTHS[month - 1]} {year}",
            f"{_MONTHS[month - 1]} {day}, {year}",
        )
        return pick(self._rng, forms)

    def clock(self) -> str:
        """Returns a time of day, 24 hours."""
        return f"{whole(self._rng, 0, 23):02d}:{whole(self._rng, 0, 59):02d}"

    def code(self, pattern: str) -> str:
        """Returns the pattern with `A` replaced by a capital letter and `9` by a digit."""
        letters = "ABCDEFGHJKLMNPRSTUVWXYZ"
        swap = {"A": lambda: pick(self._rng, letters), "9": lambda: str(whole(self._rng, 0, 9))}
        return "".join(swap[c]() if c in swap else c for c in pattern)
