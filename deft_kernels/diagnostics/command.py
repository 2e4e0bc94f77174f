"""`python -m deft_kernels report`: a page about saved logits, or hidden states and a head."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from ..core.arguments import device as device_of
from . import figures
from .gates import DEFAULT, named
from .page import page
from .recorder import Recorder
from .recording import Recording
from .stored import NAMES, find
from .streaming import Rows

DESCRIPTION = """Where each objective's gradient would come from on a model's own tokens. Reads logits and
labels, or hidden states, weight (the head, [V, D]) and labels; writes index.html, PNGs and recording.npz."""


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser("python -m deft_kernels report", description=DESCRIPTION)
    found.add_argument(
        "files", nargs="+", type=Path, metavar="FILE",
        help="npz (np.savez, not compressed) or safetensors, with tensors called " + ", ".join(NAMES),
    )  # fmt: skip
    found.add_argument("--out", type=Path, default=Path("deft-report"), help="folder (default: deft-report)")
    found.add_argument(
        "--tensor", action="append", default=[], metavar="NAME=IN_FILE",
        help="another name in the files, such as weight=lm_head.weight",
    )  # fmt: skip
    found.add_argument(
        "--objective", action="append", metavar="NAME", help=f"repeatable (default: {', '.join(DEFAULT)})"
    )
    found.add_argument("--shift", action="store_true", help="labels [..., T] are the tokens of the input")
    found.add_argument("--ignore-index", type=int, default=-100, help="label that does not count (-100)")
    found.add_argument("--temperature", type=float, default=1.0, help="divides the logits (1)")
    found.add_argument("--softcap", type=float, default=None, help="soft cap of the logits")
    found.add_argument("--logit-scale", type=float, default=1.0, help="multiplies the logits (1)")
    found.add_argument("--seed", type=int, default=0, help="of the sampled tokens (0)")
    found.add_argument("--device", default="cpu", help="where to compute (cpu)")
    return found


def main(arguments: Sequence[str]) -> int:
    """Returns 0, or 1 after an error that names the file and the field on stderr."""
    given = parser().parse_args(arguments)
    try:
        report(given)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"python -m deft_kernels report: {error}", file=sys.stderr)
        return 1
    return 0


def report(given: argparse.Namespace) -> None:
    figures.blank()  # first of all, as without matplotlib the rest is in vain
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("tqdm: the report needs it; pip install tqdm") from error

    device = _device(given.device)
    if given.out.exists() and not given.out.is_dir():
        raise ValueError(f"--out: {given.out} is no folder")
    renamed = dict(_renamed(entry) for entry in given.tensor)
    rows = Rows.of(find(given.files, renamed), ignore_index=given.ignore_index, shift=given.shift)
    chosen = {o: DEFAULT.get(o, o) for o in given.objective} if given.objective else DEFAULT
    recorder = Recorder(named(chosen), seed=given.seed, ignore_index=given.ignore_index)
    transform = {n: getattr(given, n) for n in ("temperature", "softcap", "logit_scale")}
    with tqdm(total=rows.source.rows, unit="token", desc="statistics", file=sys.stderr) as bar:
        for done in rows.recorded(recorder, device, **transform):
            bar.update(done)
    recording = recorder.recording()
    if recording.count == 0:
        raise ValueError(f"{rows.labels_in}: every label is the ignored one, {given.ignore_index}")
    source = {
        "files": ", ".join(path.name for path in given.files),
        "tokens that count": str(recording.count),
        "vocabulary": str(rows.vocabulary),
        "numbers": str(rows.source.dtype).removeprefix("torch."),
    }
    written = write(recording, given.out, source)
    alpha = recording.mean("alpha")
    print(f"mean alpha {alpha:.3f} over {recording.count} tokens; {written}")


def _device(name: str) -> torch.device:
    """Asked for before the files are read. PyTorch says in several ways that a device is not there."""
    device = device_of("--device", name)
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device: {name!r} cannot compute here ({error})") from error
    return device


def _renamed(entry: str) -> tuple[str, str]:
    name, equals, called = entry.partition("=")
    if name not in NAMES or not equals or not called:
        raise ValueError(f"--tensor: expected NAME=IN_FILE with NAME of {', '.join(NAMES)}, got {entry!r}")
    return name, called


def write(recording: Recording, folder: Path, source: dict[str, str]) -> Path:
    """The page, its pictures and the recording in a folder; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    recording.save(folder / "recording.npz")
    histogram = figures.blank(7, 4)
    figures.histogram_of_p(recording, histogram.subplots())
    mass = figures.panels_of_mass(recording)
    pictures = []
    for name, title, figure in (
        ("gradient_mass", "Gradient mass over p and H", mass),
        ("histogram_of_p", "Histogram of p", histogram),
    ):
        caption = figures.CAPTIONS[name]
        figures.save(figure, folder / f"{name}.png", caption=caption)
        pictures.append((title, folder / f"{name}.png", caption))
    # Beside and then renamed, as a page that is half there looks like a whole one.
    path, beside = folder / "index.html", folder / f".index.html.{os.getpid()}"
    try:
        beside.write_text(page(recording, pictures, source), encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return path
