"""Fine-tune a small language model on partly wrong labels, with cross-entropy and with DEFT, and compare.

    python docs/examples/finetune.py                 # two CPU cores: about two minutes; a GPU is used if there
    python docs/examples/finetune.py --corrupt 0     # what DEFT costs or gains when every label is right

A byte-level transformer learns to write Python from the standard library on this machine:

1.  pretraining, cross-entropy, on the library's top-level modules (`argparse.py`, `typing.py`, ...);
2.  fine-tuning on packages that it has not seen (`asyncio`, `email`, ...), twice from the same checkpoint, over
    the same batches in the same order: once with `F.cross_entropy`, once with `deft_loss`. A share of the
    target bytes (`--corrupt`) was replaced by random bytes, once, before either run; the inputs stay clean;
3.  every so often, a test on clean text: every fourth module of those packages, which neither run trains on.

Both losses get the same optimizer, learning rate and schedule; the rate was not tuned for either.

The held-out loss is in nats per byte and is plain cross-entropy for both runs. Read it with top-1 beside it:
a model trained by cross-entropy on noise learns to hedge (it ends near (1 - corrupt) p + corrupt / 256), which
costs it on clean text even where its first guess is right. Alpha and gate are DEFT's statistics of each model on
that text: how concentrated its predictions are, and what say the true byte would have in training.
"""

from __future__ import annotations

import argparse
import copy
import math
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from deft_kernels import deft_loss

matplotlib.use("Agg")  # write a file; most machines that train have no display
import matplotlib.pyplot as plt  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PACKAGES = "asyncio collections concurrent email html http importlib json logging multiprocessing unittest urllib"
CONTEXT, BATCH, V = 128, 8, 256
PRETRAIN_LR, FINETUNE_LR = 5e-3, 1e-3
EVALUATIONS = 10  # a run

Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]  # (logits, labels) -> loss, each row's gate


# ---------------------------------------------------------------------------------------------- text


@dataclass
class Text:
    """A stream of bytes and what a model is told to predict at each of them."""

    inputs: Tensor  # [n] uint8
    targets: Tensor  # [n] uint8, the next byte, or a random one where corrupted
    corrupted: Tensor  # [n] bool

    def windows(self, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """inputs, labels, corrupted: each [len(starts), CONTEXT]."""
        index = starts[:, None] + torch.arange(CONTEXT)
        pieces = self.inputs[index].long(), self.targets[index].long(), self.corrupted[index]
        return tuple(piece.to(DEVICE, non_blocking=True) for piece in pieces)


def read(files: list[Path], corrupt: float = 0.0, seed: int = 0) -> Text:
    stream = torch.frombuffer(bytearray(b"\n".join(f.read_bytes() for f in files)), dtype=torch.uint8)
    inputs, targets = stream[:-1], stream[1:].clone()
    generator = torch.Generator().manual_seed(seed)
    corrupted = torch.rand(len(targets), generator=generator) < corrupt
    noise = torch.randint(V, targets.shape, generator=generator, dtype=torch.uint8)
    targets[corrupted] = noise[corrupted]
    return Text(inputs, targets, targets != stream[1:])  # a random byte can be the right one


def standard_library() -> tuple[list[Path], list[Path], list[Path]]:
    """Modules for pretraining, fine-tuning and testing; sorted, so that every run reads the same."""
    root = Path(sysconfig.get_path("stdlib"))
    # _sysconfigdata is a dump of this machine's build settings, not something that anyone wrote.
    top = sorted(f for f in root.glob("*.py") if not f.name.startswith("_sysconfigdata"))
    packages = sorted(f for name in PACKAGES.split() for f in (root / name).rglob("*.py") if f.stat().st_size)
    if len(top) < 20 or len(packages) < 20:
        raise SystemExit(f"no source of the standard library under {root}: this example needs the .py files")
    return top, [f for i, f in enumerate(packages) if i % 4], packages[::4]


# --------------------------------------------------------------------------------------------- model


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        for last in (self.out, self.mlp[-1]):  # a block starts as the identity: safe at a high learning rate
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class ByteModel(nn.Module):
    """A causal transformer over bytes, small enough to learn something in a minute on two cores."""

    def __init__(self, width: int = 96, depth: int = 2, heads: int = 4, reach: int = 6) -> None:
        super().__init__()
        self.reach = reach
        self.embedding = nn.Embedding(V, width)
        # A convolution over the last few bytes hands the model its n-grams; attention alone takes thousands
        # of steps to find the previous byte.
        self.ngrams = nn.Conv1d(width, width, reach)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, V)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.ngrams(F.pad(x.transpose(1, 2), (self.reach - 1, 0))).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)))

    def logits(self, tokens: Tensor) -> Tensor:
        """The forward pass, in bf16 on a GPU; `deft_loss` takes bf16 logits as they are, without an fp32 copy."""
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            return self(tokens)


# ----------------------------------------------------------------------------------- train and judge


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, None]:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten()), None


def gated(objective: str) -> Loss:
    """deft_kernels' loss. Drop `return_stats` if the loss is all you want; the statistics cost no extra pass."""

    def loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        value, stats = deft_loss(logits, labels, objective=objective, return_stats=True)
        return value, stats.gate

    return loss


@dataclass
class Score:
    """What a model does on held-out text."""

    loss: Tensor  # [windows], nats per byte
    top1: float  # per cent
    alpha: float
    gate: float


@torch.no_grad()
def evaluate(model: ByteModel, text: Text, count: int) -> Score:
    starts = torch.linspace(0, len(text.inputs) - CONTEXT, count).long()
    pieces = []
    for part in starts.split(32):
        inputs, labels, _ = text.windows(part)
        # One pass gives every figure. The objective is DEFT for both runs: the same ruler.
        _, stats = deft_loss(model.logits(inputs), labels, objective="deft", return_stats=True)
        pieces.append(torch.stack([-stats.logp, stats.correct.float(), stats.alpha, stats.gate]).mean(-1))
    loss, *others = torch.cat(pieces, -1).cpu()
    top1, alpha, gate = (x.mean().item() for x in others)
    return Score(loss, 100 * top1, alpha, gate)


@dataclass
class Run:
    name: str
    seconds: float = 0.0  # of training; the evaluations are not counted
    steps: list[int] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    gate_right: list[float] = field(default_factory=list)  # in training: mean gate where the label is right,
    gate_wrong: list[float] = field(default_factory=list)  # and where it was corrupted


def train(run: Run, model: ByteModel, loss_of: Loss, text: Text, steps: int, lr: float, seed: int,
          judge: Callable[[], Score], evaluations: int) -> Run:
    generator = torch.Generator().manual_seed(seed)  # its own, so that both runs draw the same batches
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.05)
    warmup, every = max(1, steps // 20), math.ceil(steps / evaluations)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / warmup) * (0.525 + 0.475 * math.cos(math.pi * i / steps))
    )
    gates: list[tuple[Tensor, Tensor]] = []
    begin = time.perf_counter()
    with tqdm(total=steps, desc=f"{run.name:<14}", unit="step") as bar:
        for step in range(1, steps + 1):
            starts = torch.randint(len(text.inputs) - CONTEXT + 1, (BATCH,), generator=generator)
            inputs, labels, corrupted = text.windows(starts)
            loss, gate = loss_of(model.logits(inputs), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.update()
            if gate is not None:  # kept as tensors: a number would make every step wait for the GPU
                gates.append((gate, corrupted))
            if step % every and step < steps:
                continue
            bar.set_postfix(training_loss=f"{loss.item():.3f}")
            run.seconds += time.perf_counter() - begin
            run.steps.append(step)
            run.scores.append(judge())
            if gates:
                gate, corrupted = (torch.cat(x) for x in zip(*gates))
                run.gate_right.append(gate[~corrupted].mean().item())
                run.gate_wrong.append(gate[corrupted].mean().item())
                gates.clear()
            begin = time.perf_counter()
    return run


# -------------------------------------------------------------------------------------------- report


def table(rows: list[tuple[str, Score, float]]) -> str:
    lines = [f"{'':<20}{'held-out loss':>14}{'top-1':>9}{'mean alpha':>12}{'mean gate':>11}{'seconds':>9}",
             f"{'':<20}{'nats/byte':>14}{'%':>9}{'':>12}{'':>11}{'training':>9}"]
    for name, s, seconds in rows:
        lines.append(f"{name:<20}{s.loss.mean():>14.3f}{s.top1:>9.1f}{s.alpha:>12.3f}{s.gate:>11.3f}{seconds:>9.1f}")
    return "\n".join(lines)


def verdict(plain: Score, other: Score, name: str) -> str:
    """Whichever way it went; the error is that of the paired difference over the held-out windows."""
    difference = other.loss - plain.loss
    mean, error = difference.mean().item(), difference.std().item() / math.sqrt(len(difference))
    points = other.top1 - plain.top1
    if abs(mean) <= 2 * error:
        loss = f"no difference in held-out loss beyond the noise ({mean:+.3f} +- {error:.3f} nats/byte)"
    else:
        loss = f"{name} ends {'below' if mean < 0 else 'ABOVE'} cross-entropy by {abs(mean):.3f} +- {error:.3f} nats/byte"
    return f"{loss}; top-1 {points:+.1f} points."


def plot(before: Score, runs: list[Run], corrupt: float, path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    (loss, top1), (statistics, gates) = axes
    for run, colour in zip(runs, ("#d55e00", "#0072b2")):
        steps, scores = [0, *run.steps], [before, *run.scores]
        style = {"color": colour, "marker": ".", "label": run.name}
        loss.plot(steps, [s.loss.mean() for s in scores], **style)
        top1.plot(steps, [s.top1 for s in scores], **style)
        statistics.plot(steps, [s.alpha for s in scores], **style | {"label": f"alpha, {run.name}"})
        statistics.plot(steps, [s.gate for s in scores], **style | {"label": f"gate, {run.name}", "ls": "--"})
    gates.plot(runs[1].steps, runs[1].gate_right, color="#0072b2", marker=".", label="label is right")
    gates.plot(runs[1].steps, runs[1].gate_wrong, color="#0072b2", marker="x", ls=":", label="label is wrong")
    gates.axhline(1, color="#d55e00", label="cross-entropy: every label")
    gates.set_ylim(0, 1.05)
    titles = "held-out loss, nats/byte", "held-out top-1, %", "held-out alpha and gate", f"gate in training, {runs[1].name}"
    for axis, title in zip(axes.flat, titles):
        axis.set(title=title, xlabel="fine-tuning step")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(f"Fine-tuning with {corrupt:.0%} of the target bytes replaced; clean held-out text")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corrupt", type=float, default=0.3, help="share of target bytes replaced (default 0.3)")
    parser.add_argument("--objective", default="deft", help="deft_loss's objective: deft, cayley, neg_prob, ...")
    parser.add_argument("--steps", type=int, default=500, help="fine-tuning steps of each run")
    parser.add_argument("--pretrain-steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("finetune.png"))
    parser.add_argument("--tiny", action="store_true", help="a few seconds, to see that it runs; learns nothing")
    args = parser.parse_args()
    evaluations, windows = EVALUATIONS, 192
    if args.tiny:
        args.steps, args.pretrain_steps, evaluations, windows = 10, 20, 2, 16

    torch.manual_seed(args.seed)
    pretraining, finetuning, testing = standard_library()
    print(f"{len(pretraining)} modules to pretrain on, {len(finetuning)} to fine-tune on, {len(testing)} to test on")
    clean, noisy, held_out = read(pretraining), read(finetuning, args.corrupt, args.seed), read(testing)

    base = ByteModel().to(DEVICE)
    start = train(Run("pretraining"), base, cross_entropy, clean, args.pretrain_steps, PRETRAIN_LR, args.seed,
                  lambda: evaluate(base, held_out, windows), 1)
    before = start.scores[-1]
    runs = []
    for name, loss_of in (("cross-entropy", cross_entropy), (args.objective, gated(args.objective))):
        model = copy.deepcopy(base)
        runs.append(train(Run(name), model, loss_of, noisy, args.steps, FINETUNE_LR, args.seed + 1,
                          lambda: evaluate(model, held_out, windows), evaluations))

    after = [(run.name, run.scores[-1], run.seconds) for run in runs]
    print("", table([("before fine-tuning", before, start.seconds), *after]), "", sep="\n")
    print(verdict(runs[0].scores[-1], runs[1].scores[-1], args.objective))
    print(f"gate in training: {runs[1].gate_right[-1]:.3f} where the label is right, "
          f"{runs[1].gate_wrong[-1]:.3f} where it is wrong")
    plot(before, runs, args.corrupt, args.out)
    print(f"curves: {args.out}")


if __name__ == "__main__":
    main()
