"""What keeps the code readable, as far as a test can see it: short lists of parameters, short files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "deft_kernels"
PARAMETERS, LINES = 12, 320
# Who takes more, and why.
LONGER = {
    "reference.py: loss": "the keywords of the public call",
    "integrations/liger.py: __call__": "the signature of Liger's own function, which it stands in for",
    "operators/terms.py: linear_row_loss_of_terms": "an operator takes tensors and settings one by one",
    "operators/terms.py: _": "the shapes of that operator",
    "backends/triton/kernels.py: statistics_kernel": "tensors and sizes of a launch, and four records",
    "backends/triton/kernels.py: finish_kernel": "tensors and sizes of a launch, and four records",
    "backends/triton/kernels.py: fused_kernel": "tensors and sizes of a launch, and five records",
    "backends/triton/gradient_kernels.py: gradient_kernel": "tensors and sizes of a launch, and five records",
}


def sources() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), path.read_text()


def test_parameters() -> None:
    longer = set()
    for file, text in sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                arguments = node.args
                count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
                if (
                    count - (arguments.args[:1] != [] and arguments.args[0].arg in ("self", "ctx"))
                    > PARAMETERS
                ):
                    longer.add(f"{file}: {node.name}")
    assert longer == set(LONGER)


def test_files() -> None:
    assert not [file for file, text in sources() if text.count("\n") > LINES]
