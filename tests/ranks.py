"""Cases that run in real processes, one pool of them a test file, as starting PyTorch takes seconds.

NCCL where there are enough GPUs, else gloo on the CPU. Every case is a function that all ranks call.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import emulation
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import start_method

# Seconds without a case coming to an end before all are given up: a rank that waits for one that failed.
PATIENCE = 600


def device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def _compile_in_turns(lock: Path) -> None:
    """Ranks launch the same kernels: the first compiles one, and the others find it in Triton's cache."""
    if find_spec("triton") is None:
        return
    import fcntl

    import triton.compiler

    compile = triton.compiler.compile

    def in_turn(*args: Any, **keywords: Any) -> Any:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return compile(*args, **keywords)

    triton.compiler.compile = in_turn


def _worker(
    rank: int, ranks: int, folder: str, cases: Sequence[Callable[[], None]], gpus: bool, given: dict[str, str]
) -> None:
    # A fork server has the variables of the moment it began.
    os.environ |= given
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    nccl = gpus and torch.cuda.device_count() >= ranks
    if nccl:
        torch.cuda.set_device(rank)
    else:
        # Before Triton is imported, and not in the parent, whose kernels may run on a GPU.
        emulation.start()
        _compile_in_turns(Path(folder, "compiling"))
    store = f"file://{folder}/store"
    dist.init_process_group("nccl" if nccl else "gloo", init_method=store, rank=rank, world_size=ranks)
    for case in cases:
        torch.manual_seed(0)
        outcome = "passed"
        try:
            case()
            emulation.fail_on_reports("in this case")
        except BaseException:
            outcome = traceback.format_exc()
        Path(folder, f"{case.__name__}.{rank}").write_text(outcome)
        dist.barrier()
    dist.destroy_process_group()


def run(cases: Sequence[Callable[[], None]], ranks: int, gpus: bool = True) -> dict[str, list[str]]:
    """What became of each case on each rank: "passed", the traceback, or that it never came to an end.

    gpus: False for cases whose tensors are on the CPU wherever they run.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(
            _worker,
            args=(ranks, folder, cases, gpus, dict(os.environ)),
            nprocs=ranks,
            join=False,
            start_method=start_method(),
        )
        done, waited = 0, 0.0
        while not _joined(context):
            finished = len(list(Path(folder).iterdir()))
            waited = 0.0 if finished > done else waited + 2
            done = finished
            if waited >= PATIENCE:
                for process in context.processes:
                    process.kill()
                break
        return {case.__name__: [_outcome(folder, case.__name__, r) for r in range(ranks)] for case in cases}


def _joined(context: mp.ProcessContext) -> bool:
    """Whether all processes have come to an end; one that was aborted takes the others with it."""
    try:
        return context.join(timeout=2)
    except mp.ProcessExitedException:
        return True


def _outcome(folder: str, case: str, rank: int) -> str:
    report = Path(folder, f"{case}.{rank}")
    return report.read_text() if report.exists() else "hangs in this case or in one before"
