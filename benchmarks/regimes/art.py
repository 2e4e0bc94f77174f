"""FIGlet art of words: as one symbol a glyph's row, and as the characters themselves.

A sample is a prompt, `font>word` and a line feed, and the rows of the art, each with a line feed, and one
more as the end. Loss and scores are of the art. Words of four letters, fonts of four rows in cells six
wide.

cells: a glyph's row is one printable byte, in an order of each font's own; with few words the model has to
learn which byte belongs to which letter. ascii: the characters, most of them blanks.
"""

from __future__ import annotations

import collections
import re
from functools import lru_cache
from typing import NamedTuple

import torch
from rapidfuzz.distance import JaroWinkler
from texts import DEVICE, ByteModel, pretraining
from torch import Tensor

FONTS = ("cybermedium", "stick_letters", "contessa", "muzzle", "graceful")
OTHER_FONTS = ("madrid", "amc_3_line")  # of which no art is ever trained on
ROWS, WIDTH, LETTERS = 4, 6, 4
WORDS = 60  # in each of train, validation and test
PRINTABLE = bytes(range(33, 127))
IGNORED = -100


class Sample(NamedTuple):
    word: str
    font: str
    prompt: bytes
    art: bytes


@lru_cache
def words() -> dict[str, list[str]]:
    """The commonest words of four letters in the text of the pre-training, dealt out in turn."""
    text = bytes(pretraining().inputs.tolist()).decode("latin-1")
    counted = collections.Counter(re.findall(rf"\b[a-z]{{{LETTERS}}}\b", text))
    common = sorted(counted, key=lambda word: (-counted[word], word))[: 3 * WORDS]
    return {split: common[i::3] for i, split in enumerate(("train", "validation", "test"))}


@lru_cache
def glyphs(font: str) -> dict[str, list[str]]:
    """The rows of each letter, all six wide."""
    import pyfiglet

    made = pyfiglet.FigletFont(font)
    found = {}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        rows = [row.replace(made.hardBlank, " ") for row in made.chars[ord(letter)]]
        found[letter] = [row.ljust(WIDTH) for row in rows]
        if len(rows) != ROWS or any(len(row) != WIDTH for row in found[letter]):
            raise SystemExit(
                f"{font}: expected letters of {ROWS} rows and at most {WIDTH} columns, {letter!r} has not"
            )
    return found


@lru_cache
def symbols(font: str) -> dict[str, int]:
    """A printable byte for each glyph's row of a font."""
    rows = sorted({row for glyph in glyphs(font).values() for row in glyph})
    generator = torch.Generator().manual_seed(FONTS.index(font))
    order = torch.randperm(len(PRINTABLE), generator=generator).tolist()
    return {row: PRINTABLE[place] for row, place in zip(rows, order, strict=False)}


def sample(kind: str, word: str, font: str) -> Sample:
    lines = []
    for row in range(ROWS):
        cells = [glyphs(font)[letter][row] for letter in word]
        whole = bytes(symbols(font)[cell] for cell in cells) if kind == "cells" else "".join(cells).encode()
        lines.append(whole + b"\n")
    place = (*FONTS, *OTHER_FONTS).index(font)
    return Sample(word, font, b"%c>%s\n" % (b"ABCDEFG"[place], word.encode()), b"".join(lines) + b"\n")


def samples(kind: str, split: str) -> list[Sample]:
    """Those of a split; "fonts": the words of the training in the other fonts."""
    if split == "fonts":
        return [sample(kind, word, font) for word in words()["train"] for font in OTHER_FONTS]
    return [sample(kind, word, font) for word in words()[split] for font in FONTS]


def encoded(which: list[Sample]) -> tuple[Tensor, Tensor]:
    """(inputs, labels), each [samples, length]; the labels of the prompt are ignored."""
    whole = torch.tensor([list(s.prompt + s.art) for s in which], device=DEVICE)
    labels = whole[:, 1:].clone()
    labels[:, : len(which[0].prompt) - 1] = IGNORED
    return whole[:, :-1], labels


def ink(kind: str, which: list[Sample]) -> Tensor:
    """Which labels of `encoded` are neither blank, line feed nor prompt, [samples, length]."""
    labels = encoded(which)[1]
    shown = (labels != IGNORED) & (labels != ord("\n"))
    if kind == "cells":
        blank = torch.tensor([symbols(s.font).get(" " * WIDTH, 0) for s in which], device=DEVICE)
        return shown & (labels != blank[:, None])
    return shown & (labels != ord(" "))


@torch.no_grad()
def written(model: ByteModel, which: list[Sample]) -> list[bytes]:
    """What the model writes after each prompt, the most probable byte each time, as long as the art."""
    tokens = torch.tensor([list(s.prompt) for s in which], device=DEVICE)
    for _ in range(len(which[0].art)):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return [bytes(row) for row in tokens[:, len(which[0].prompt) :].tolist()]


def _lines(art: bytes) -> list[str]:
    """What can be seen of it: up to the end, blanks at a line's end and blank lines apart."""
    lines = art.split(b"\n\n")[0].decode("latin-1").split("\n")
    return [line.rstrip() for line in lines]


def scores(which: list[Sample], found: list[bytes]) -> dict[str, float]:
    """Per cent of words and of lines that are exact, and the Jaro-Winkler similarity of the whole art."""
    exact, lines, right, alike = 0, 0, 0, 0.0
    for s, art in zip(which, found, strict=True):
        wanted, got = _lines(s.art), _lines(art)
        exact += [x for x in wanted if x] == [x for x in got if x]
        lines += sum(map(bool, wanted))
        right += sum(a == b for a, b in zip(wanted, got, strict=False) if a)
        alike += JaroWinkler.similarity("\n".join(got), "\n".join(wanted))
    return {
        "exact_words": 100 * exact / len(which),
        "exact_lines": 100 * right / lines,
        "jaro_winkler": alike / len(which),
    }
