"""Write docs/api.md: every public name with its signature. A test holds the page, so that a change of what is
public is a decision.

    python docs/surface.py
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"
OBJECTIVES = "deft_kernels.objectives"
MODULES = {
    "deft_kernels": "the calls, and their modules",
    "deft_kernels.objectives": "what is trained",
    "deft_kernels.parallel": "labels of sequences that ranks share",
    "deft_kernels.diagnostics": "what the gate does to a run's tokens",
    "deft_kernels.integrations.transformers": "transformers, and trainers made of its own",
    "deft_kernels.integrations.trl": "TRL",
    "deft_kernels.integrations.liger": "Liger's losses",
    "deft_kernels.integrations.axolotl": "Axolotl",
    "deft_kernels.integrations.torchtitan": "torchtitan",
    "deft_kernels.integrations.verl": "verl",
    "deft_kernels.integrations.megatron": "Megatron-Core",
    "deft_kernels.integrations.nemo": "NeMo AutoModel",
    "deft_kernels.integrations.swift": "the plugins of ms-swift",
    "deft_kernels.integrations.columns": "columns of a data set",
    "deft_kernels.integrations.callback": "a trainer's logs",
    "deft_kernels.integrations.running": "running statistics",
}
HEAD = """\
# Public names

Written by `python docs/surface.py`; a test holds it. What is not here is not public, and may change at any
time. Each docstring (`help(deft_kernels.deft_loss)`) gives the formula, shapes, dtypes, units, errors and
sources.

What a name here promises: arguments before `*` keep their place, keywords keep their names, defaults and
meaning. Where a call says nothing of errors, a TypeError or ValueError names the argument that cannot be
honoured. A name or keyword that has to go is kept for two minor releases, with a DeprecationWarning that
says what to write instead. New keywords come at the end, with a default that changes nothing. Errors keep
their types, not their words. A loss may change in its last digits.

"""


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The functions and classes that the module offers."""
    also = ("deft_kernels.weighted", "deft_kernels.row_objectives") if module.__name__ == OBJECTIVES else ()
    for name in getattr(module, "__all__", sorted(vars(module))):
        value = getattr(module, name)
        if name.startswith("_") or not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        if hasattr(module, "__all__") or value.__module__ in (module.__name__, *also):
            yield name, value


def of_source(module: str) -> Iterator[tuple[str, str]]:
    """(name, definition) in a module that cannot be imported without its trainer; of one that only gives
    another module's names, those."""
    body = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text()).body
    if not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in body):
        package = module.rpartition(".")[0]
        for node in body:
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = {alias.name for alias in node.names}
                for own, definition in of_source(f"{package}.{node.module}"):
                    if own.partition(".")[0] in names:
                        yield own, definition
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list):
                continue
            members = [node] if isinstance(node, ast.FunctionDef) else list(node.body)
            for member in members:
                hidden = isinstance(member, ast.FunctionDef) and member.name.startswith("_")
                if isinstance(member, ast.FunctionDef) and (not hidden or member.name == "__init__"):
                    own = (
                        node.name
                        if member is node or member.name == "__init__"
                        else f"{node.name}.{member.name}"
                    )
                    yield own, f"{own}({ast.unparse(bare(member.args))})"


def bare(arguments: ast.arguments) -> ast.arguments:
    """Without annotations, and without self."""
    for each in ast.walk(arguments):
        if isinstance(each, ast.arg):
            each.annotation = None
    if arguments.args and arguments.args[0].arg == "self":
        del arguments.args[0]
    return arguments


def signature(name: str, value: Any) -> str:
    """One parameter a line, without annotations that only repeat the docstring."""
    if inspect.isclass(value) and issubclass(value, dict):
        return f"{name}: a dict of {', '.join(value.__annotations__)}"
    given = inspect.signature(value)
    lines, star = [], False
    for parameter in given.parameters.values():
        text = parameter.name
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            lines.append("*")
            star = True
        if parameter.kind is parameter.VAR_POSITIONAL:
            text, star = f"*{text}", True
        if parameter.kind is parameter.VAR_KEYWORD:
            text = f"**{text}"
        if parameter.default is not parameter.empty:
            text += f"={written(parameter.default)}"
        lines.append(text)
    whole = f"{name}({', '.join(lines)})"
    return whole if len(whole) <= 110 else f"{name}(\n    " + ",\n    ".join(lines) + ",\n)"


def written(value: Any) -> str:
    if inspect.isclass(value) or inspect.isfunction(value):
        return value.__name__
    text = repr(value)
    return "..." if " at 0x" in text else text


def first_line(value: Any) -> str:
    text = (inspect.getdoc(value) or "").split("\n")[0].replace("|", "\\|")
    return "a record" if text.startswith(value.__name__ + "(") else text


def returned(value: Any) -> str:
    """Of a function its annotation, of a module that of its call; aliases written out."""
    if inspect.isclass(value):
        value = vars(value).get("forward")
        if value is None:
            return ""
    text = str(getattr(value, "__annotations__", {}).get("return", ""))
    alias = inspect.unwrap(value).__globals__.get(text) if text.isidentifier() else None
    written_out = alias if get_args(alias) else None
    text = re.sub(r"\b(?:\w+\.)+", "", str(written_out)) if written_out else text
    return f"`{text}`".replace("|", "\\|") if text else ""


def errors(value: Any) -> str:
    """What the docstring says after "Raises:", up to the next word with a colon, or paragraph."""
    found = re.search(
        r"Raises: (.*?)(?=\n\s*\n|\s(?:Memory|Source|Communication|Limits|Matrix\s+products):|\Z)",
        inspect.getdoc(value) or "",
        flags=re.DOTALL,
    )
    return " ".join(found[1].split()).replace("|", "\\|") if found else ""


def methods(value: type) -> Iterator[str]:
    for name, member in sorted(vars(value).items()):
        if name.startswith("_") or name in ("forward",) or not inspect.isfunction(member):
            continue
        yield signature(f"{value.__name__}.{name}", member)


def page() -> str:
    text = HEAD
    for name, what in MODULES.items():
        text += f"## {name}\n\n{what[0].upper()}{what[1:]}.\n\n"
        if ".integrations." in name:
            blocks = [definition for _, definition in of_source(name)]
        else:
            found = list(public(importlib.import_module(name)))
            rows = "".join(
                f"| `{each}` | {first_line(value)} | {returned(value)} | {errors(value)} |\n"
                for each, value in found
            )
            text += f"| name | | returns | raises |\n|---|---|---|---|\n{rows}\n"
            blocks = []
            for each, value in found:
                blocks += [signature(each, value), *(methods(value) if inspect.isclass(value) else ())]
        text += "".join(f"    {line}\n" for line in "\n".join(blocks).split("\n")) + "\n"
    return text.rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
