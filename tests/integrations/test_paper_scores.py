"""docs/examples/paper/scores.py by hand-made answers."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
from documents import ROOT

FOLDER = ROOT / "docs" / "examples" / "paper"
spec = importlib.util.spec_from_file_location("scores", FOLDER / "scores.py")
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
        (r"\boxed{-1,234,567.50}", r"\boxed{-1234567.5}", 1),
        (r"\boxed{+.5}", r"\boxed{0.50}", 1),
        (r"\boxed{-\frac{2}{4}}", r"\boxed{-0.5}", 1),
        (r"\boxed{1e3}", r"\boxed{1000}", 1),
        (r"\boxed{1\text{e}3}", r"\boxed{1000}", 1),
        (r"\boxed{2.5e-1}", r"\boxed{1/4}", 1),
        (r"\boxed{101_2}", r"\boxed{1012}", 0),  # in base 2
        (rf"\boxed{{{10**250}.0}}", rf"\boxed{{{10**250}}}", 1),
        (rf"\boxed{{{'7' * 9000}}}", rf"\boxed{{{'7' * 8999}}}", 0),
        (rf"\boxed{{{'7' * 9000}}}", rf"\boxed{{{'7' * 9000}}}", 1),  # the same text
    ],
)
def test_exact(written: str, solution: str, score: int) -> None:
    assert scores.exact(written, solution) == score


@pytest.mark.parametrize(
    "call",
    [
        r'exact(r"\boxed{1e99999999}", r"\boxed{2}")',
        r'exact(r"\boxed{2}", r"\boxed{1e99999999}")',
        r'exact(r"\boxed{1e-99999999}", r"\boxed{2}")',
        r'exact(r"\boxed{-1.5E+9_999_999}", r"\boxed{2}")',
        r'exact("\\boxed{%s}" % ("1," * 10**5 + "000"), r"\boxed{2}")',
        r'exact("\\boxed{%s" % ("1" * 10**5), r"\boxed{2}")',
        r'choice("the answer is" + " " * 10**5, "B")',
        r'choice("\\boxed{%s}" % (" " * 10**5), "B")',
    ],
)
def test_no_answer_takes_long(call: str) -> None:
    """Results are written once all answers are judged. In a process, as arithmetic cannot be stopped."""
    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); from scores import choice, exact; print({call})"
    done = subprocess.run(
        [sys.executable, "-c", code], timeout=20, check=True, capture_output=True, text=True
    )
    assert float(done.stdout) == 0


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


@pytest.mark.parametrize(
    "box, letter",
    [
        ("B", "B"),
        ("b", "B"),
        ("(b)", "B"),
        ("B. Aspirin", "B"),
        ("b) aspirin", "B"),
        ("B Aspirin", "B"),
        ("B\nAspirin", "B"),
        ("(B) Aspirin", "B"),
        ("B - aspirin", "B"),
        (r"B\ Aspirin", "B"),
        ("B~Aspirin", "B"),
        (r"B\,Aspirin", "B"),
        (r"\text{B Aspirin}", "B"),
        (r"\mathbf{B}\text{ aspirin}", "B"),
        (r"$B$ aspirin", "B"),
        ("B. A patient with asthma", "B"),
        ("B and water", "B"),
        ("A patient", "A"),  # nothing says whether it is the article; a choice is what was asked for
        ("a patient", None),
        ("Because", None),
        ("Both", None),
        ("B12", None),
        ("Aspirin", None),
        ("Aspirin B", None),
        ("B or C", None),
        ("B and C", None),
        ("", None),
    ],
)
def test_the_letter_of_a_box(box: str, letter: str | None) -> None:
    found = {wanted for wanted in "ABCDEI" if scores.choice(rf"The answer is (D), \boxed{{{box}}}", wanted)}
    assert found == ({letter} if letter else set())


def test_words_and_their_similarity() -> None:
    assert scores.word(" sun\n", "sun") == 1 and scores.word("Sun", "sun") == 0
    # The textbook pair: 0.9611 with the usual weight of the prefix.
    assert scores.jaro_winkler("MARTHA", "MARHTA") == pytest.approx(0.9611, abs=5e-5)
    assert scores.jaro_winkler("", "sun") == 0
