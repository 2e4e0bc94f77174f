"""Fine-tune a small language model on partly wrong labels, with cross-entropy and with DEFT, and compare.

    python docs/examples/finetune.py               # two to three minutes on a CPU; uses a GPU if present
    python docs/examples/finetune.py --corrupt 0   # what DEFT gains or costs when every label is right
    python docs/examples/finetune.py --logits logits.npz   # for the report of docs/diagnostics.md

A byte-level transformer learns Python from the standard library of the interpreter that runs it:

1. Pretraining, with cross-entropy, on the library's top-level modules (`argparse.py`, `typing.py`, ...).
2. Fine-tuning on packages it has not seen (`asyncio`, `email`, ...), twice: from the same checkpoint, over
   the same batches, once with `F.cross_entropy` and once with `deft_loss`. A share of the target bytes was
   replaced by random bytes beforehand, the same ones for both runs; the inputs stay clean.
3. Before, during and after, a test on clean text: every fourth module of those packages, never trained on.

Optimizer, learning rate and schedule are the same for both losses and tuned for neither. What to expect, DEFT
against cross-entropy at the end (CPU, defaults, mean of seeds 0 to 2):

    share of wrong labels        0     15%     30%     50%
    top-1, points             +0.2    +0.9    +1.3    +1.7
    loss, nats per byte      +0.35   +0.16   -0.06   -0.37

Cross-entropy learns from the noise to be unsure (alpha falls). DEFT ignores it and becomes more sure of what
it believes (alpha rises). The loss on held-out text suffers from both, and at 30% its sign depends on the
learning rate (DEFT -0.13 at 5e-4, +0.06 at 2e-3, seed 0); top-1 is better with DEFT at each. If labels are
clean and you need calibrated probabilities, cross-entropy is the better loss.
"""

from __future__ import annotations

import argparse
import copy
import io
import math
import os
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from deft_kernels import deft_loss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PACKAGES = "asyncio collections concurrent email http importlib json logging multiprocessing unittest urllib"
VOCABULARY, CONTEXT, BATCH = 256, 128, 8
PRETRAIN_LR, FINETUNE_LR = 5e-3, 1e-3
EVALUATIONS = 10  # in a run, and one more before its first step

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]  # (logits, labels) -> mean loss, rows' gates


class Text(NamedTuple):
    """A stream of bytes, and at each of them the byte that the model is told to predict."""

    inputs: Tensor  # [n] uint8
    labels: Tensor  # [n] uint8: the next byte, or a random one
    wrong: Tensor  # [n] bool: where the label is not the next byte

    def windows(self, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(inputs, labels, wrong) on the device, each [len(starts), CONTEXT]."""
        inputs, labels, wrong = (x[starts[:, None] + torch.arange(CONTEXT)].to(DEVICE) for x in self)
        return inputs.long(), labels.long(), wrong


def read(files: list[Path], corrupt: float = 0.0, seed: int = 0) -> Text:
    stream = torch.frombuffer(bytearray(b"\n".join(f.read_bytes() for f in files)), dtype=torch.uint8)
    inputs, following = stream[:-1], stream[1:]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(VOCABULARY, following.shape, generator=generator, dtype=torch.uint8)
    labels = torch.where(torch.rand(following.shape, generator=generator) < corrupt, noise, following)
    return Text(inputs, labels, labels != following)


def standard_library() -> tuple[list[Path], list[Path], list[Path]]:
    """Modules for pretraining, fine-tuning and testing; sorted, so that every run reads the same."""
    root = Path(sysconfig.get_path("stdlib"))
    # _sysconfigdata is a dump of one machine's build settings, not something anyone wrote.
    top = sorted(f for f in root.glob("*.py") if not f.name.startswith("_sysconfigdata"))
    packages = sorted(f for name in PACKAGES.split() for f in (root / name).rglob("*.py") if f.stat().st_size)
    if len(top) < 20 or len(packages) < 20:
        raise SystemExit(f"this example reads the standard library's .py files: too few under {root}")
    return top, [f for i, f in enumerate(packages) if i % 4], packages[::4]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        for last in (self.out, self.mlp[-1]):  # begin as the identity: it allows a high learning rate
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class ByteModel(nn.Module):
    """A causal transformer over bytes, small enough to learn something in a minute on two cores."""

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4, reach: int = 6) -> None:
        super().__init__()
        self.reach = reach
        self.embedding = nn.Embedding(VOCABULARY, width)
        # Hands each position the last few bytes; attention alone needs thousands of steps to find them.
        self.recent = nn.Conv1d(width, width, reach)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        # bf16 on a GPU. deft_loss takes the bf16 logits as they are and computes in fp32, without a copy.
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            x = self.embedding(tokens)
            x = x + self.recent(F.pad(x.transpose(1, 2), (self.reach - 1, 0))).transpose(1, 2)
            return self.head(self.norm(self.blocks(x + self.position[: tokens.shape[1]])))


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, None]:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), None


def gated(objective: str) -> Loss:
    """The same with a trust gate. Where the loss is all you want, `deft_loss(logits, labels)` is enough."""

    def loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        mean, stats = deft_loss(logits, labels, objective=objective, return_stats=True)  # one pass gives both
        return mean, stats.gate

    return loss


class Score(NamedTuple):
    """A model on the held-out text, by the same measures whatever it was trained with; each [windows]."""

    loss: Tensor  # cross-entropy, nats per byte
    top1: Tensor  # per cent
    alpha: Tensor  # DEFT's focus index: how concentrated the predictions are
    gate: Tensor  # DEFT's gate: the weight that the true byte would have in training


@torch.no_grad()
def evaluate(model: ByteModel, text: Text, windows: int) -> Score:
    scores = []
    for starts in torch.linspace(0, len(text.inputs) - CONTEXT, windows).long().split(32):
        inputs, labels, _ = text.windows(starts)
        _, stats = deft_loss(model(inputs), labels, objective="deft", return_stats=True)
        rows = torch.stack([-stats.logp, 100 * stats.correct.float(), stats.alpha, stats.gate])
        scores.append(rows.mean(-1).cpu())
    return Score(*torch.cat(scores, -1))


@torch.no_grad()
def save_logits(model: ByteModel, text: Text, path: Path, windows: int = 96) -> None:
    """logits [windows, CONTEXT, VOCABULARY] and labels [windows, CONTEXT], spread evenly over the text."""
    inputs, labels, _ = text.windows(torch.linspace(0, len(text.inputs) - CONTEXT, windows).long())
    np.savez(path, logits=model(inputs).float().cpu().numpy(), labels=labels.cpu().numpy())


class Run(NamedTuple):
    name: str
    steps: list[int]  # at which it was tested; 0 comes first
    scores: list[Score]
    gates: list[tuple[float, float]]  # mean in training since the last test: at right labels, at wrong ones
    seconds: float  # of training alone


def train(
    name: str, model: ByteModel, loss_of: Loss, text: Text, steps: int, lr: float, score: Callable[[], Score]
) -> Run:
    run = Run(name, [0], [score()], [], 0.0)
    generator = torch.Generator().manual_seed(torch.initial_seed())  # both runs draw the same batches
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps + 1, pct_start=0.05, cycle_momentum=False
    )
    pending: list[tuple[Tensor, Tensor]] = []
    seconds, begin = 0.0, time.perf_counter()
    for step in (bar := tqdm(range(1, steps + 1), desc=f"{name:<14}", unit="step")):
        starts = torch.randint(len(text.inputs) - CONTEXT + 1, (BATCH,), generator=generator)
        inputs, labels, wrong = text.windows(starts)
        loss, gate = loss_of(model(inputs), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if gate is not None:
            pending.append((gate, wrong))  # still tensors: asking for a number would wait for the GPU
        if step % math.ceil(steps / EVALUATIONS) == 0 or step == steps:
            bar.set_postfix(loss=f"{loss.item():.3f}")
            seconds += time.perf_counter() - begin
            run.steps.append(step)
            run.scores.append(score())
            if pending:
                gate, wrong = (torch.cat(x) for x in zip(*pending, strict=True))
                run.gates.append((gate[~wrong].mean().item(), gate[wrong].mean().item()))
                pending.clear()
            begin = time.perf_counter()
    return run._replace(seconds=seconds)


def table(rows: list[tuple[str, Score, float]]) -> str:
    lines = [f"{'':<20}{'nats/byte':>10}{'top-1 %':>10}{'mean alpha':>12}{'mean gate':>11}{'seconds':>9}"]
    for name, score, seconds in rows:
        loss, top1, alpha, gate = (x.mean().item() for x in score)
        lines.append(f"{name:<20}{loss:>10.3f}{top1:>10.1f}{alpha:>12.3f}{gate:>11.3f}{seconds:>9.1f}")
    return "\n".join(lines)


def compare(name: str, score: Score, baseline: Score) -> str:
    """The result, whichever loss won; its standard errors are over held-out windows, not over seeds."""
    parts = []
    for i, what, unit, sign in ((0, "loss", "nats/byte", -1), (1, "top-1", "points", 1)):
        difference = score[i] - baseline[i]
        mean, error = difference.mean().item(), difference.std().item() / math.sqrt(len(difference))
        word = "undecided" if abs(mean) <= 2 * error else "better" if sign * mean > 0 else "worse"
        parts.append(f"{what} {word} ({mean:+.3f} +- {error:.3f} {unit})")
    return f"{name} against cross-entropy, held out: {', '.join(parts)}"


def plot(plain: Run, ours: Run, corrupt: float, path: Path) -> None:
    figure = Figure(figsize=(12, 4), layout="constrained")
    loss, top1, trust = figure.subplots(1, 3)
    for run, colour in ((plain, "#d55e00"), (ours, "#0072b2")):
        line = {"color": colour, "marker": ".", "label": run.name}
        loss.plot(run.steps, [s.loss.mean() for s in run.scores], **line)
        top1.plot(run.steps, [s.top1.mean() for s in run.scores], **line)
        line["label"] = f"alpha, held out, {run.name}"
        trust.plot(run.steps, [s.alpha.mean() for s in run.scores], **line)
    right, wrong = zip(*ours.gates, strict=True)
    trust.plot(ours.steps[1:], right, color="#000000", ls="--", label=f"gate, {ours.name}: label is right")
    trust.plot(ours.steps[1:], wrong, color="#000000", ls=":", label=f"gate, {ours.name}: label is wrong")
    trust.set_ylim(bottom=0)
    titles = "Held-out loss, nats/byte", "Held-out top-1, %", "What the models trust"
    for axes, title in zip((loss, top1, trust), titles, strict=True):
        axes.set(title=title, xlabel=f"fine-tuning step ({corrupt:.0%} of the labels replaced)")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def file_of(option: str, path: Path, ending: str) -> Path:
    """The file that will be written; one that cannot be is refused now, and not after the training."""
    file = path if path.is_dir() or path.name.endswith(ending) else path.with_name(path.name + ending)
    if file.is_dir():
        raise SystemExit(f"{option}: {file} is a folder")
    if not file.parent.is_dir():
        raise SystemExit(f"{option}: no folder {file.parent}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise SystemExit(f"{option}: {file} cannot be written")
    return file


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    objectives = ["deft", "cayley", "rational", "neg_prob", "dft", "eaft", "nll"]
    parser.add_argument("--corrupt", type=float, default=0.3, help="share of wrong labels (default 0.3)")
    parser.add_argument("--objective", default="deft", choices=objectives, help="default: deft")
    parser.add_argument("--steps", type=int, default=600, help="of each fine-tuning (default 600)")
    parser.add_argument("--pretrain-steps", type=int, default=2000, help="default: 2000")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("finetune.png"), help="default: finetune.png")
    parser.add_argument(
        "--logits", type=Path, help="an .npz for the pretrained model's logits of held-out text"
    )
    parser.add_argument("--tiny", action="store_true", help="a few seconds, to see it run; learns nothing")
    args = parser.parse_args()
    if not 0 <= args.corrupt < 1:
        parser.error(f"--corrupt: {args.corrupt} is no share in [0, 1)")
    if args.steps < 1:
        parser.error(f"--steps: {args.steps} is not above 0")
    if args.pretrain_steps < 0:
        parser.error(f"--pretrain-steps: {args.pretrain_steps} is below 0")
    args.out = file_of("--out", args.out, args.out.suffix or ".png")
    try:
        Figure().savefig(io.BytesIO(), format=args.out.suffix[1:])
    except ValueError as error:
        parser.error(f"--out: {error}")
    if args.logits:
        args.logits = file_of("--logits", args.logits, ".npz")
    return args


def main() -> None:
    args = parsed()
    pretrain_steps, steps, windows = (20, 10, 16) if args.tiny else (args.pretrain_steps, args.steps, 192)

    torch.manual_seed(args.seed)
    torch.set_num_threads(
        1
    )  # with more threads so small a model gains little, and beside other programs loses much
    pretraining, finetuning, held_out = standard_library()
    clean, noisy, unseen = read(pretraining), read(finetuning, args.corrupt, args.seed), read(held_out)

    def run(name: str, model: ByteModel, loss_of: Loss, text: Text, steps: int, lr: float) -> Run:
        return train(name, model, loss_of, text, steps, lr, lambda: evaluate(model, unseen, windows))

    base = ByteModel().to(DEVICE)
    before = run("pretraining", base, cross_entropy, clean, pretrain_steps, PRETRAIN_LR)
    if args.logits:
        save_logits(base, unseen, args.logits)
    plain = run("cross-entropy", copy.deepcopy(base), cross_entropy, noisy, steps, FINETUNE_LR)
    ours = run(args.objective, copy.deepcopy(base), gated(args.objective), noisy, steps, FINETUNE_LR)

    rows = [("before fine-tuning", before), ("cross-entropy", plain), (args.objective, ours)]
    print("\n" + table([(name, x.scores[-1], x.seconds) for name, x in rows]) + "\n")
    print(compare(args.objective, ours.scores[-1], plain.scores[-1]))
    right, wrong = ours.gates[-1]
    at_wrong = "" if math.isnan(wrong) else f", {wrong:.3f} at wrong ones"
    print(f"{args.objective}'s mean gate in training: {right:.3f} at right labels{at_wrong}")
    plot(plain, ours, args.corrupt, args.out)
    print(f"curves: {args.out}")
    if args.logits:
        print(f"logits before fine-tuning: {args.logits}")


if __name__ == "__main__":
    main()
