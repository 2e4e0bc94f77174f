"""docs/examples/paper/scores.py by hand-made answers."""

from __future__ import annotations

import importlib.util

import pytest
from documents import ROOT

spec = importlib.util.spec_from_file_location("scores", ROOT / "docs/examples/paper/scores.py")
assert spec is not None and spec.loader is not None
scores = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scores)


@pytest.mark.parametrize(
    "written, solution, score",
    [
        (r"so \boxed{4}", r"\boxed{4}", 1),
        (r"\boxed{3}, no, \boxed{4}", r"\boxed{4}", 1),
        (r"\boxed{4}, no, \boxed{3}", r"\boxed{4}", 0),
        ("it is 4", r"\boxed{4}", 0),
        (r"\boxed{\dfrac{1}{2}}", r"\boxed{\frac{1}{2}}", 1),
        (r"\boxed{0.5}", r"\boxed{\frac{1}{2}}", 1),
        (r"\boxed{1/2}", r"\boxed{-\frac{1}{2}}", 0),
        (r"\boxed{1,000}", r"\boxed{1000}", 1),
        (r"\boxed{1,2}", r"\boxed{12}", 0),
        (r"\boxed{\left(1, 2\right)}", r"\boxed{(1,2)}", 1),
        (r"\boxed{x^{2}}", r"\boxed{x^{2}}", 1),
        (r"\boxed{x^{2}", r"\boxed{x^{2}}", 0),
        (r"\boxed{\text{Tuesday}}", r"\boxed{Tuesday}", 1),
        (r"\boxed{1/0}", r"\boxed{0}", 0),
    ],
)
def test_exact(written: str, solution: str, score: int) -> None:
    assert scores.exact(written, solution) == score


def test_exact_wants_a_boxed_reference() -> None:
    with pytest.raises(ValueError, match="reference solution has no"):
        scores.exact("4", "4")


@pytest.mark.parametrize(
    "written, score",
    [
        (r"\boxed{B}", 1),
        (r"\boxed{\text{B. aspirin}}", 1),
        (r"the answer is B, so \boxed{C}", 0),
        ("The answer is (B).", 1),
        ("The answer is A. No, the answer is B.", 1),
        ("Answer: C", 0),
        ("B", 1),
        ("B. aspirin", 1),
        ("(b)", 0),
        ("Both are true", 0),
        ("A patient is ill. The answer is unclear", 0),
        ("", 0),
    ],
)
def test_choice(written: str, score: int) -> None:
    assert scores.choice(written, "B") == score


def test_words_and_their_similarity() -> None:
    assert scores.word(" sun\n", "sun") == 1 and scores.word("Sun", "sun") == 0
    # The textbook pair: 0.9611 with the usual weight of the prefix.
    assert scores.jaro_winkler("MARTHA", "MARHTA") == pytest.approx(0.9611, abs=5e-5)
    assert scores.jaro_winkler("", "sun") == 0
