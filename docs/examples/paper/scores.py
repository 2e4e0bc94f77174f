"""What a model wrote, judged: exact answer, multiple choice, word, Jaro-Winkler similarity."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from rapidfuzz.distance import JaroWinkler

# A number as answers write it. Fraction would also take 1e99999999, and never be done with its digits.
NUMBER = re.compile(r"[-+]?(?:\d+/\d+|(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?)")
LONGEST = 300  # characters of a number; a guess, far above any answer. Longer ones are compared as text


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} holds, braces balanced; None if there is none or it is not closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin, depth = start + len("\\boxed{"), 1
    for at in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[begin:at]
    return None


def _plain(answer: str, space: str = "") -> str:
    """Without what LaTeX adds for the eye; every space, LaTeX's own too, becomes `space`."""
    drawn = r"\\(?:left|right|displaystyle|limits)\b|\\!|\$|(\\[,;: ]|~)"
    answer = re.sub(drawn, lambda found: space if found[1] else "", answer)
    answer = re.sub(r"\\[dt]frac", r"\\frac", answer)
    answer = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", answer)
    return re.sub(r"\s+", space, answer).rstrip(".")


def _number(answer: str) -> Fraction | None:
    answer = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer)
    answer = re.sub(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", answer)
    if len(answer) > LONGEST or not NUMBER.fullmatch(answer):
        return None
    try:
        return Fraction(answer)
    except ZeroDivisionError:
        return None


def exact(written: str, solution: str) -> float:
    """1 if the last boxed answers are the same text, LaTeX's spacing apart, or the same rational number."""
    wanted, found = boxed(solution), boxed(written)
    if wanted is None:
        raise ValueError(f"the reference solution has no \\boxed{{}}: {solution!r:.200}")
    if found is None:
        return 0.0
    found, wanted = _plain(found), _plain(wanted)
    number = _number(found)
    return float(found == wanted or (number is not None and number == _number(wanted)))


def choice(written: str, letter: str) -> float:
    """1 if the letter is the one in the last box, after the last "answer is", or alone at the beginning."""
    box = boxed(written)
    if box is not None:
        # A capital before a space is a choice with its text ("B aspirin"); "a patient" and "B or C" are none.
        one = r"\W*([A-Z]\b(?!\s+(?:and|or)\s+[A-Z]\b)|[a-z]\b(?!\s+\w))"
        found = re.match(one, _plain(box, space=" "))
    else:
        named = list(re.finditer(r"\banswer\s*(?:is|:)\W*([A-Za-z])\b(?!')", written, flags=re.IGNORECASE))
        found = named[-1] if named else re.match(r"\s*\(?([A-Z])(?:[).:]|\s*$)", written)
    return float(found is not None and found[1].upper() == letter.strip().upper())


def word(written: str, wanted: str) -> float:
    """1 if it is the word, white space around it apart."""
    return float(written.strip() == wanted.strip())


def jaro_winkler(written: str, wanted: str) -> float:
    """0 to 1, by rapidfuzz; the prefix's weight is the usual 0.1."""
    return JaroWinkler.similarity(written.strip(), wanted.strip())


MEASURES: dict[str, Callable[[str, str], float]] = {
    "exact": exact,
    "choice": choice,
    "word": word,
    "jaro_winkler": jaro_winkler,
}
