"""What README and docs show runs as it stands; only what a block takes as given is made here.

The pages of docs/integrations are run beside their stacks, by tests/integrations and tests/stacks.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from documents import ROOT, commands, execute, fenced, text
from processes import collected
from ranks import run
from torch import Tensor, nn

from deft_kernels import deft_loss

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
STACKS = sorted((ROOT / "docs" / "integrations").glob("*.md"))
# The Python blocks of these pages by what a test gives them: whole tensors, or the parts of two ranks.
ALONE = {
    "README.md": (0, 1),
    "docs/start.md": (0, 1, 3, 4),
    "docs/linear.md": (0,),
    "docs/troubleshooting.md": (0, 1),
}
# By tests/test_recipes.py.
RECIPES = {"docs/recipes.md": (0, 1, 2, 3, 4, 5, 6)}
# By tests/test_diagnostics_docs.py; a block over a trainer by tests/integrations.
DIAGNOSTICS = {"docs/diagnostics.md": (0, 1, 2, 3, 4)}
ON_RANKS = {"docs/start.md": (2,), "docs/parallel.md": (0, 1, 2, 3)}
# By tests/test_adding_*.py: blocks of `diff`, new files, and commands that run where both were applied.
FOLLOWED = ("docs/objectives.md", "docs/keyword.md", "docs/trainer.md")
# Files that these pages make.
NEW = {"test_inverse_temperature.py", "ignite.py", "test_ignite.py"}
# A program of its own.
PROGRAMS = {"docs/kernels.md": (0,)}
# Files that pages name and that belong to other packages.
OF_OTHERS = {"pretrain_gpt.py"}
B, T, D, V = 2, 5, 6, 12


def given() -> dict[str, object]:
    """Tensors as a causal language model has them, and that model, as far as the blocks look into it."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=generator)
    head = nn.Linear(D, V, bias=False)
    head.weight = nn.Parameter(torch.randn(V, D, generator=generator))
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, :2] = -100
    hidden.requires_grad_()
    trunk = lambda input_ids: SimpleNamespace(last_hidden_state=hidden)  # noqa: E731
    return {
        "logits": torch.randn(B, T, V, generator=generator).requires_grad_(),
        "labels": labels,
        "hidden": hidden,
        "model": SimpleNamespace(model=trunk, lm_head=head),
        "input_ids": labels.clamp(min=0),
        "torch": torch,
        "dist": dist,
        "deft_loss": deft_loss,
    }


def gradient_of(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def test_every_block_is_run() -> None:
    """A new block wants a place in ALONE or ON_RANKS, or a test beside its stack."""
    for page in PAGES:
        blocks = set(range(len(fenced(page, "python"))))
        placed = (places.get(page, ()) for places in (ALONE, ON_RANKS, PROGRAMS, RECIPES, DIAGNOSTICS))
        assert page in FOLLOWED or blocks == set(chain(*placed)), page
        fences = re.findall(r"^```(\w+)$", text(page), flags=re.MULTILINE)
        assert set(fences) <= {"python", "sh", *(["diff"] if page in FOLLOWED else [])}, page
    sources = [path.read_text() for folder in ("integrations", "stacks") for path in _tests(folder)]
    for path in STACKS:
        page = path.stem
        if fenced(f"docs/integrations/{page}.md", "(?:python|yaml|text)"):
            assert any(f'"{page}"' in source for source in sources), page


def _tests(folder: str) -> list[Path]:
    return sorted((ROOT / "tests" / folder).glob("*.py"))


@pytest.mark.skipif(platform.system() != "Linux", reason="Triton is for Linux")
@pytest.mark.parametrize("page", PROGRAMS)
def test_programs(page: str, tmp_path: Path) -> None:
    for block in PROGRAMS[page]:
        program = tmp_path / f"block{block}.py"
        program.write_text(fenced(page, "python")[block])
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), environment.get("PYTHONPATH", "")])
        run = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-2000:]
        assert run.stdout.startswith("[]"), run.stdout[:500]


@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_the_first_example(page: str) -> None:
    names = given()
    execute(page, 0, names)
    logits = names["logits"]
    assert isinstance(logits, Tensor) and logits.grad is not None
    exact = logits.detach().double().requires_grad_()
    deft_loss(exact, names["labels"], backend="reference").backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("page, block", [("README.md", 1), ("docs/start.md", 1), ("docs/linear.md", 0)])
def test_linear_examples(page: str, block: int) -> None:
    names = given()
    loss = execute(page, block, names)["loss"]
    hidden, weight = names["hidden"], names["model"].lm_head.weight
    whole = deft_loss(hidden @ weight.T, names["labels"], shift=True)
    torch.testing.assert_close(loss, whole)
    for mine, theirs in zip(
        gradient_of(loss, hidden, weight), gradient_of(whole, hidden, weight), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_an_objective_of_ones_own() -> None:
    names = given()
    loss = execute("docs/start.md", 3, names)["loss"]
    logits, labels = names["logits"], names["labels"]
    valid = labels != -100
    logp = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)[valid]
    focal = (-((1 - logp.exp()) ** 2) * logp).mean()
    torch.testing.assert_close(loss, focal)
    torch.testing.assert_close(gradient_of(loss, logits)[0], gradient_of(focal, logits)[0])


def test_what_to_log(capsys: pytest.CaptureFixture[str]) -> None:
    names = given()
    scope = execute("docs/start.md", 4, names)
    nll, alpha, gate = (
        float(number) for number in re.findall(r"tensor\(([-0-9.e]+)\)", capsys.readouterr().out)
    )
    logits, labels = names["logits"].detach(), names["labels"]
    plain = nn.functional.cross_entropy(logits.reshape(-1, V), labels.reshape(-1))
    assert nll == pytest.approx(plain.item(), rel=1e-3)
    p = logits.softmax(-1)[labels != -100]
    assert alpha == pytest.approx((p * p).sum(-1).mean().item(), rel=1e-3)
    assert 0 < gate <= 1
    assert torch.equal(scope["valid"], labels != -100)
    _, shifted = deft_loss(logits, labels, shift=True, return_stats=True)
    assert torch.equal(shifted.max_prob != 0, nn.functional.pad(labels[:, 1:] != -100, (0, 1)))


def test_troubleshooting(capsys: pytest.CaptureFixture[str]) -> None:
    names = given()
    names["logits"] = names["logits"].detach()
    for block in ALONE["docs/troubleshooting.md"]:
        execute("docs/troubleshooting.md", block, names)
    assert capsys.readouterr().out.count("tensor(") == 2


def two_ranks_of(names: dict[str, object]) -> dict[str, object]:
    """What a rank holds of the same tensors: columns of the logits, rows of the head."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    columns = slice(rank * V // ranks, (rank + 1) * V // ranks)
    logits, weight = names["logits"].detach(), names["model"].lm_head.weight.detach()
    return names | {
        "tp_group": dist.group.WORLD,
        "dp_group": dist.group.WORLD,
        "rank": rank,
        "ranks": ranks,
        "V": V,
        "local_logits": logits[..., columns].clone().requires_grad_(),
        "local_weight": weight[columns].clone().requires_grad_(),
    }


def start_on_two_ranks() -> None:
    names = two_ranks_of(given())
    loss = execute("docs/start.md", 2, {**names, **imports()})["loss"]
    whole = deft_loss(names["hidden"] @ names["model"].lm_head.weight.T, names["labels"])
    torch.testing.assert_close(loss, whole)


def imports() -> dict[str, object]:
    """What a page imported in an earlier block."""
    import deft_kernels

    return {
        name: getattr(deft_kernels, name) for name in ("deft_loss", "fused_linear_deft_loss", "objectives")
    }


def parallel_page_on_two_ranks() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    page = "docs/parallel.md"
    names = two_ranks_of(given()) | imports()
    logits, labels = names["logits"], names["labels"]
    whole = deft_loss(logits, labels)
    gradient = gradient_of(whole, logits)[0]
    columns = slice(names["rank"] * V // 2, (names["rank"] + 1) * V // 2)

    scope = execute(page, 0, names)
    torch.testing.assert_close(names["local_logits"].grad, gradient[..., columns])
    linear = deft_loss(names["hidden"] @ names["model"].lm_head.weight.T, labels)
    torch.testing.assert_close(scope["loss"], linear)
    torch.testing.assert_close(names["hidden"].grad, gradient_of(linear, names["hidden"])[0])

    scope = execute(page, 1, {**names, **imports(), "VocabShard": scope["VocabShard"]})
    torch.testing.assert_close(scope["loss"], whole)

    mesh = init_device_mesh("cpu", (2,))
    placed = distribute_tensor(logits.detach(), mesh, [Shard(2)])
    loss = execute(page, 2, {**names, "logits": placed})["loss"]
    assert isinstance(loss, DTensor)
    torch.testing.assert_close(loss.full_tensor(), whole.detach())

    # Each rank has rows of its own: the average over the ranks is the loss of all of them.
    own = {"logits": logits[names["rank"]], "labels": labels[names["rank"]]}
    execute(page, 3, {**names, **imports(), **own})
    first = fenced(page, "python")[3].split("\n\n")[0]
    local = dict(names | imports() | own)
    exec(first, local)
    mean = local["loss"].detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / 2, whole.detach())


CASES = [start_on_two_ranks, parallel_page_on_two_ranks]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[str]]:
    return run(CASES, ranks=2, gpus=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_examples_on_two_ranks(case, outcomes: dict[str, list[str]]) -> None:
    assert outcomes[case.__name__] == ["passed"] * 2, "\n".join(outcomes[case.__name__])


SHELL = [(page, line) for page in PAGES if page not in FOLLOWED for line in commands(page)]


def test_the_pages_have_commands() -> None:
    assert len(SHELL) >= 8


@pytest.mark.parametrize("page, line", SHELL, ids=[line[:60] for _, line in SHELL])
def test_commands_exist(page: str, line: str) -> None:
    """The files and modules that a command names are there; a pytest line selects something."""
    for part in re.split(r"\s*&&\s*|\s*;\s*", line):
        words = shlex.split(part, comments=True)
        program, *arguments = words
        if program.endswith("python") and arguments[:2] == ["-m", "pytest"]:
            program, arguments = "pytest", arguments[2:]
        if program == "pytest":
            selects_tests(arguments)
        elif program.endswith(("python", "python3")) and arguments[0] == "-m":
            # Not by find_spec: setuptools hooks into that, and warns where distutils was imported.
            assert PathFinder.find_spec(arguments[1], [str(ROOT), *sys.path]) is not None
        elif program.endswith("python"):
            assert (ROOT / arguments[0]).is_file()
            knows(arguments)
        elif program == "accelerate":
            script = next(i for i, word in enumerate(arguments) if word.endswith(".py"))
            assert arguments[0] == "launch" and (ROOT / arguments[script]).is_file()
            knows(arguments[script:])
        elif program == "pip":
            assert arguments[0] == "install"
        else:
            assert (ROOT / program).is_file()


def selects_tests(arguments: list[str]) -> None:
    paths = [word for word in arguments if not word.startswith("-") and "/" in word and word.endswith(".py")]
    paths += [word for word in arguments if word in ("benchmarks", "tests/integrations", "tests/properties")]
    for path in paths:
        assert (ROOT / path).exists()
    if "tests/integrations" in paths and find_spec("transformers") is None:
        pytest.skip("needs the stacks of tests/integrations")
    if "benchmarks" in " ".join(paths) and find_spec("matplotlib") is None:
        pytest.skip("needs the extra bench")
    if not paths:  # the whole suite, which this is a part of
        return
    if "benchmarks" in " ".join(paths) and not torch.cuda.is_available() and "-k" in arguments:
        # A GPU's records name its own sizes, which are not collected without one: the rest of the line is.
        at = arguments.index("-k")
        if any(re.search(r"\d+x\d+", word) for word in arguments[at + 1].split()):
            arguments = arguments[:at] + arguments[at + 2 :]
    outcome, printed = collected(arguments, ROOT)
    assert outcome == 0, printed


@cache
def helped(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)


def knows(arguments: list[str]) -> None:
    """A script's own options, as its --help lists them."""
    outcome = helped(arguments[0])
    if outcome.returncode != 0 and "ModuleNotFoundError" in outcome.stderr:
        pytest.skip(outcome.stderr.splitlines()[-1])
    assert outcome.returncode == 0, outcome.stderr
    for option in arguments[1:]:
        assert not option.startswith("--") or option in outcome.stdout


def test_links_lead_somewhere() -> None:
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_contributing_names_every_module() -> None:
    """Its table of folders, against what lies there."""
    package = "deft_kernels/"
    table = re.findall(rf"^\| `({package}[\w/]*)` \| (.*?) \|", text("CONTRIBUTING.md"), flags=re.MULTILINE)
    named = {folder: sorted(re.findall(r"`(\w+)`", modules)) for folder, modules in table}
    for folder, modules in named.items():
        there = [path.stem for path in (ROOT / folder).glob("*.py") if not path.stem.startswith("__")]
        assert modules == sorted(set(there) - {"version"}), folder
    folders = {path.parent.relative_to(ROOT).as_posix() + "/" for path in (ROOT / package).rglob("*.py")}
    assert set(named) == folders


def test_named_files_exist() -> None:
    """Every Python file that a page names, by its name or the last folders of its path."""
    ours = ("benchmarks", "deft_kernels", "docs", "tests")
    files = [path.relative_to(ROOT).as_posix() for part in ours for path in (ROOT / part).rglob("*.py")]
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for name in re.findall(r"(?<![\w/.-])([\w/]+\.py)\b", path.read_text()):
            new = path.name in ("keyword.md", "trainer.md") and name.rpartition("/")[2] in NEW
            if not new and name not in OF_OTHERS and "NAME" not in name:
                assert any(f"/{file}".endswith(f"/{name}") for file in files), f"{path.name}: {name}"


def test_names_in_the_steps_exist() -> None:
    """Where something new goes, by names: each is a word of the package, its tests or its settings."""
    files = [*(ROOT / "deft_kernels").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    words = set(re.findall(r"\w+", " ".join(path.read_text() for path in [*files, ROOT / "setup.cfg"])))
    steps = text("CONTRIBUTING.md").split("## Where something new goes")[1].split("\n## ")[0]
    more = text("docs/objectives.md").split("## If yours needs more")[1]
    more += text("docs/keyword.md").split("## Further")[1]
    named = set(re.findall(r"`(?:\w+\.)?(\w+)(?:: [^`]*)?`", steps + more)) - {"py", "md"}
    assert len(named) > 30
    assert named <= words, named - words
