"""The parts of benchmarks/regimes: art, remedies, measures, and the page that is written from records."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from documents import ROOT

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("rapidfuzz")
pytest.importorskip("pyfiglet")

FOLDER = ROOT / "benchmarks" / "regimes"
RECORDS = ROOT / "benchmarks" / "results" / "regimes"


@pytest.fixture(scope="module")
def part() -> Iterator[Any]:
    """Imports a file of the folder, which is a program and no package; afterwards none of them is known."""
    before, path = set(sys.modules), list(sys.path)
    sys.path.insert(0, str(FOLDER))

    def imported(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield imported
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith((str(FOLDER), str(ROOT / "docs"))):
            del sys.modules[name]


@pytest.mark.parametrize("kind", ["cells", "ascii"])
def test_art(part: Any, kind: str) -> None:
    art = part("art")
    split = {name: art.samples(kind, name) for name in ("train", "validation", "test")}
    words = [{s.word for s in samples} for samples in split.values()]
    assert all(len(w) == art.WORDS for w in words) and len(set.union(*words)) == 3 * art.WORDS
    # What is scored against itself is right; what is not the word's is wrong, however alike it looks.
    some = split["test"][:10]
    itself = art.scores(some, [s.art for s in some])
    assert itself == {"exact_words": 100, "exact_lines": 100, "jaro_winkler": 1}
    other = art.scores(some, [s.art for s in some[5:] + some[:5]])
    assert other["exact_words"] == 0 and other["exact_lines"] < 50 and other["jaro_winkler"] < 1
    # Blanks at the end of a line cannot be seen.
    bare = [b"\n".join(line.rstrip() for line in s.art.split(b"\n")) for s in some]
    assert art.scores(some, bare)["exact_words"] == 100
    inputs, labels = art.encoded(some)
    assert (labels[:, : len(some[0].prompt) - 1] == art.IGNORED).all()
    first = bytes(labels[0][labels[0] != art.IGNORED].tolist())
    assert first == some[0].art and inputs.shape == labels.shape
    shown = art.ink(kind, some)
    assert not (shown & torch.isin(labels, torch.tensor([32, 10, art.IGNORED]))).any() and shown.any(1).all()
    if kind == "ascii":
        import pyfiglet

        # The blanks between letters apart, it is what FIGlet draws.
        drawn = pyfiglet.Figlet(font=some[0].font, width=200).renderText(some[0].word)
        ours = some[0].art.decode()
        assert ours.replace(" ", "").strip() == drawn.replace(" ", "").strip()
    else:
        art_of = {s.art for s in split["train"]}
        assert len(art_of) == len(split["train"]) and max(max(a) for a in art_of) < 127


def test_remedies(part: Any) -> None:
    from deft_kernels import deft_loss, row_statistics

    treatments = part("treatments")
    z = 3 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    y = z.argmax(-1)
    alpha = row_statistics(z, y).collision
    assert alpha.max() > 0.6

    def trained_with(name: str, done: float) -> torch.Tensor:
        objective = treatments.treatment(name)(z, y, done)
        return deft_loss(z, y, objective=objective, return_stats=True)[1].alpha

    zero = torch.zeros_like(alpha)
    for name, done, expected in (
        ("deft", 0.0, alpha),
        ("deft-nll-first", 0.19, zero),
        ("deft-nll-first", 0.21, alpha),
        ("deft-ramp", 0.0, zero),
        ("deft-ramp", 0.25, alpha / 2),
        ("deft-ramp", 0.9, alpha),
        ("deft-cap", 0.0, alpha.clamp(max=0.5)),
    ):
        torch.testing.assert_close(trained_with(name, done), expected, atol=1e-6, rtol=1e-5)


def test_dft_is_left_out_because_it_has_the_gradient_of_neg_prob() -> None:
    from deft_kernels import deft_loss

    z = torch.randn(16, 50, requires_grad=True)
    y = torch.randint(50, (16,))
    gradients = [torch.autograd.grad(deft_loss(z, y, objective=o), z)[0] for o in ("dft", "neg_prob")]
    torch.testing.assert_close(*gradients)


def test_calibration_error(part: Any) -> None:
    measures = part("measures")
    confidence = torch.tensor([0.9] * 10 + [0.3] * 10)
    correct = torch.tensor([1.0] * 9 + [0.0] + [1.0] * 10)
    # The sure ones are right as often as they say; the unsure ones always, which is 0.7 more.
    assert measures.calibration_error(confidence, correct) == pytest.approx(0.35, abs=1e-6)


def test_the_grid_goes_on_at_its_edges(part: Any) -> None:
    further, beyond = part("run").further, [3e-4, 1.2e-2, 2.4e-2]
    assert further(6e-3, [1e-3, 3e-3, 6e-3], beyond) == [1.2e-2, 2.4e-2]
    assert further(1.2e-2, [1e-3, 6e-3, 1.2e-2], beyond) == [2.4e-2]
    assert further(1e-3, [1e-3, 3e-3, 6e-3], beyond) == [3e-4]
    assert further(3e-3, [1e-3, 3e-3, 6e-3], beyond) == further(2.4e-2, [6e-3, 2.4e-2], beyond) == []


def test_rates_and_their_moves(part: Any) -> None:
    rates = part("rates")
    made = [rates.Rate("a", str(i), gate, rate, rate, False) for i, (gate, rate) in
            enumerate([(1.0, 1e-3), (0.5, 2e-3), (0.1, 4e-3)])]  # fmt: skip
    assert rates.moves(made)["by_top1"] == pytest.approx(-1)
    made[2] = made[2]._replace(by_top1=1e-3)
    assert -0.5 < rates.moves(made)["by_top1"] <= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "0"], "--workers: expected 1"),
        (["--scale", "-1"], "--scale: expected 1"),
        (["--seed", "-1"], "--seed: expected 0"),
    ],
)
def test_arguments_of_the_run(
    arguments: list[str],
    message: str,
    part: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit, match="2"):
        part("run").main()
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_size(part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "settings.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path), "--tiny"])
    with pytest.raises(SystemExit, match=r"settings\.json: the folder has records of another size"):
        part("run").main()


def test_two_seeds_of_a_run_share_none(part: Any, tmp_path: Path) -> None:
    """Neither of its results nor of its grid; the first batch of pre-training is another one, too."""
    run, cells = part("run"), part("cells")
    size, plan = run.TINY
    seeds: list[set[int]] = []
    for seed in (0, 1):
        runner = run.Runner(tmp_path / str(seed), size._replace(seed=seed, pretrain=1), plan, 1)
        seeds.append({runner.grid_seed})
        runner.all = lambda cells, what, seen=seeds[-1]: seen.update(cell.seed for cell in cells) or []
        runner.chosen = lambda: ({("cipher", "nll"): 1e-3}, [])
        runner.records()
    assert len(seeds[0]) == len(seeds[1]) == 1 + plan.seeds
    assert not seeds[0] & seeds[1]
    first, second = (cells.load(tmp_path / str(seed), size._replace(seed=seed)) for seed in (0, 1))
    assert not torch.equal(*(next(model.parameters()) for model in (first, second)))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    (folder / "records.json").write_text((RECORDS / "records.json").read_text())
    return folder


def test_the_page_is_what_the_records_say(part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = part("evidence")
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--out", str(tmp_path)])
    evidence.main()
    assert (tmp_path / "evidence.md").read_text() == (ROOT / "docs" / "evidence.md").read_text()
    drawn = {path.name for path in (tmp_path / "images").glob("*.png")}
    assert drawn == {path.name for path in (ROOT / "docs" / "images").glob("evidence-*.png")}


def test_a_claim_follows_the_records(part: Any, copy: Path) -> None:
    results, claims = part("results"), part("claims")
    whole = json.loads((copy / "records.json").read_text())

    def verdict(deft: dict[int, float]) -> str:
        for record in whole["records"]:
            if (record["split"], record["task"], record["objective"]) == ("test", "cipher", "deft"):
                record["measured"]["cipher"]["top1"] = deft[record["seed"]]
        (copy / "changed.json").write_text(json.dumps(whole))
        found = claims.of_paper(results.Results(copy / "changed.json"))
        return next(c.verdict for c in found if c.text == "deft has the best top-1, weak regime: cipher")

    assert verdict({0: 99.0, 1: 99.0, 2: 99.0}) == "agrees"
    assert verdict({0: 99.0, 1: 99.0, 2: 1.0}) == "seeds differ"
    assert verdict({0: 1.0, 1: 1.0, 2: 1.0}) == "disagrees"


def test_two_runs_side_by_side(part: Any, copy: Path) -> None:
    """A second run that has two tasks only, one of whose results is another."""
    again, results = part("again"), part("results")
    whole = json.loads((RECORDS / "records.json").read_text())
    whole["records"] = [r for r in whole["records"] if r["task"] in ("strong-30", "cipher")]
    whole["size"]["seed"] = 1
    whole |= {"minutes": 40.2, "workers": 2, "found": 0}

    def section() -> tuple[list[Any], str]:
        (copy / "second.json").write_text(json.dumps(whole))
        first, second = (results.Results(path) for path in (RECORDS / "records.json", copy / "second.json"))
        return again.differences(first, second), again.section(first, second)

    both, text = section()
    assert {x.part for x in both} == {"strong-30", "cipher"}
    assert all(x.within and not x.turned for x in both)
    assert f"{len(both)} of {len(both)} lie within" in text and "Every verdict on these is the same" in text
    assert "**" not in text and "--seed 1 --task strong-30 --task cipher`" in text
    assert "40 of the clock with 2 workers" in text
    for record in whole["records"]:
        if (record["split"], record["task"], record["objective"]) == ("test", "strong-30", "deft"):
            record["measured"]["strong-30"]["top1"] -= 20
    both, text = section()
    (other,) = (x for x in both if not x.within)
    assert (other.part, other.objective, other.turned) == ("strong-30", "deft", True)
    assert f"{len(both) - 1} of {len(both)} lie within" in text and "deft on strong-30" in text
    assert "| where 30 % of the labels are wrong, deft is above nll in top-1 | agrees | disagrees |" in text


def test_records_that_are_none(part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = part("evidence")
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--records", str(tmp_path), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"records\.json: not there"):
        evidence.main()
    (tmp_path / "records.json").write_text('{"records": [')
    with pytest.raises(SystemExit, match=r"records\.json: not the records of benchmarks/regimes/run\.py"):
        evidence.main()
