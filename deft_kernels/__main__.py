"""`python -m deft_kernels`: versions, devices, the backend a call would take and why, one checked call.

`python -m deft_kernels report FILE...` writes a page about saved logits (docs/diagnostics.md).
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from importlib import metadata

import torch

from .backends import choice
from .functional import deft_loss
from .version import __version__

HELP = """\
python -m deft_kernels                  versions, devices, the backend a call would take, one checked call
python -m deft_kernels report FILE...   a page about saved logits; report --help says more"""
ROWS, VOCABULARY = 4, 4099


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _reason(device: torch.device, dtype: torch.dtype) -> str:
    obstacle = choice.obstacle(device, dtype)
    if choice.choose("auto", device, dtype) == "triton":
        return "the kernels support this device and dtype"
    if obstacle is None:
        return "the interpreter runs the kernels on the CPU only when backend='triton' is asked for"
    return obstacle


def _check(device: torch.device, dtype: torch.dtype, backend: str) -> tuple[float, float]:
    """Relative errors of loss and gradient (of its largest entry) against the float64 reference."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(ROWS, VOCABULARY, generator=generator) * 4).to(dtype).to(device).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator).to(device)
    loss = deft_loss(logits, labels, backend=backend)
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    expected = deft_loss(exact, labels, backend="reference")
    expected.backward()
    assert logits.grad is not None
    assert exact.grad is not None
    gradient = (logits.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    return abs(loss.item() / expected.item() - 1.0), gradient.item()


def main() -> int:
    print(f"deft-kernels {__version__}, Python {platform.python_version()}, {platform.system()}")
    print(f"torch {torch.__version__}, triton {_version('triton')}, numpy {_version('numpy')}")
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        devices.append(torch.device("cuda", index))
        major, minor = torch.cuda.get_device_capability(index)
        print(f"cuda:{index}: {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}")
    if len(devices) == 1:
        print(f"no GPU visible to PyTorch; {torch.get_num_threads()} CPU threads")
    checks = [(device, "auto") for device in devices]
    if choice.interpreted():
        print("TRITON_INTERPRET is set: backend='triton' runs the kernels in Triton's interpreter")
        checks.append((torch.device("cpu"), "triton"))
    elif len(devices) == 1:
        print(
            "the kernels were not run; TRITON_INTERPRET=1 python -m deft_kernels runs them in an interpreter"
        )

    failed = False
    for device, backend in checks:
        for dtype, bound in ((torch.float32, 3e-5), (torch.bfloat16, 2**-8)):
            chosen = choice.choose(backend, device, dtype)
            reason = _reason(device, dtype) if backend == "auto" else "as asked, in the interpreter"
            loss, gradient = _check(device, dtype, backend)
            good = loss <= 3e-5 and gradient <= bound
            failed |= not good
            print(
                f"{device}, {str(dtype)[6:]}: backend {chosen!r} ({reason})\n    against the "
                f"float64 reference: loss {loss:.1e}, gradient {gradient:.1e} relative: "
                f"{'good' if good else 'WRONG'}"
            )
    return int(failed)


def command(arguments: Sequence[str]) -> int:
    """Without arguments the doctor."""
    if not arguments:
        return main()
    if arguments[0] == "report":
        from .diagnostics import command as report

        return report.main(arguments[1:])
    if arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0
    known = "nothing, for versions and a check, or: report FILE..."
    print(f"python -m deft_kernels: unknown {arguments[0]!r}; expected {known}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(command(sys.argv[1:]))
