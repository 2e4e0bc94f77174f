"""A Triton driver without a device: kernels are specialised and compiled by Triton itself for a CUDA
target, and their PTX runs in the emulator, on CPU tensors.

    emulator = Emulator(arch=90)
    with emulator.active():
        kernel[grid](tensor, ...)
    for report in emulator.reports.take(): ...

Triton must not have been imported under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import fcntl
import functools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia

from .codegen import KINDS, Kernel
from .machine import Launch, Settings
from .opcodes import SIZE, TYPES
from .parser import Unsupported
from .reports import Benign, Reports
from .traffic import Traffic

# What Triton asks of a device: an H200's.
PROPERTIES = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


@dataclass
class Statistics:
    launches: int = 0
    seconds: float = 0.0  # running
    translating: float = 0.0  # PTX to Python


def flattened(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """(type, value) of an argument; tuples are passed element by element."""
    if isinstance(kind, tuple):
        for k, v in zip(kind, value, strict=True):
            yield from flattened(k, v)
    else:
        yield kind, value


class Emulator:
    """arch: 80, 90 or 100.  benign: reports that are known, each with its reason."""

    count = 0

    def __init__(self, arch: int = 90, settings: Settings | None = None, benign: tuple[Benign, ...] = ()):
        self.arch, self.settings, self.reports = arch, settings or Settings(), Reports(benign)
        self.kernels: dict[str, Kernel] = {}
        self.statistics = Statistics()
        self.traffic: Traffic | None = None
        self.rewrite: Callable[[str], str] | None = None  # of PTX before it runs: to plant defects
        # Triton keeps compiled kernels by device: a number of its own, so that no two emulators share them.
        Emulator.count += 1
        self.device = Emulator.count

    def kernel(self, ptx: str) -> Kernel:
        if ptx not in self.kernels:
            start = time.perf_counter()
            self.kernels[ptx] = Kernel(ptx)
            self.statistics.translating += time.perf_counter() - start
        return self.kernels[ptx]

    def launch(
        self, ptx: str, grid: tuple[int, int, int], shared: int, arguments: list[tuple[str, Any]]
    ) -> None:
        """arguments: (Triton type, value) of those that are not constexpr."""
        kernel = self.kernel(self.rewrite(ptx) if self.rewrite else ptx)
        start = time.perf_counter()
        parameters: list[Any] = []
        tensors = {}
        for n, parameter in enumerate(kernel.parameters):
            kind = TYPES[parameter.kind]
            if n >= len(arguments):
                # Triton's own scratch buffers, which a launch without any passes as null.
                parameters.append(KINDS[kind](0))
                continue
            triton_type, value = arguments[n]
            if isinstance(value, torch.Tensor):
                if not triton_type.startswith("*") or value.device.type != "cpu":
                    raise Unsupported(
                        f"{kernel.name}: argument {n}, a tensor on {value.device} as {triton_type}"
                    )
                tensors[n] = value
                parameters.append(np.uint64(value.data_ptr()))
            elif triton_type == "fp32":
                parameters.append(np.float32(value))
            elif triton_type[0] in "iu" and triton_type[1:].isdigit():
                parameters.append(KINDS[kind](int(value) & ((1 << 8 * SIZE[kind]) - 1)))
            else:
                raise Unsupported(f"{kernel.name}: argument {n} of type {triton_type}")
        # A tensor without elements has no address, and no access to it is legal.
        run = Launch(kernel, grid, shared, parameters, tensors, self.reports, self.settings, self.traffic)
        run.run()
        self.statistics.launches += 1
        self.statistics.seconds += time.perf_counter() - start

    @contextmanager
    def counting(self) -> Iterator[Traffic]:
        """The memory traffic of the launches inside."""
        self.traffic = Traffic()
        try:
            yield self.traffic
        finally:
            self.traffic = None

    @contextmanager
    def planted(self, rewrite: Callable[[str], str]) -> Iterator[None]:
        """Launches inside run changed PTX."""
        self.rewrite = rewrite
        try:
            yield
        finally:
            self.rewrite = None

    def driver(self) -> Driver:
        return Driver(self)

    def install(self) -> None:
        """Make it Triton's driver from here on."""
        os.environ.pop("TRITON_INTERPRET", None)
        _keep_ptx()
        _compile_once()
        triton.runtime.driver.set_active(self.driver())

    @contextmanager
    def active(self) -> Iterator[Emulator]:
        """Triton's driver inside; the one before afterwards."""
        before = triton.runtime.driver._active
        self.install()
        try:
            yield self
        finally:
            triton.runtime.driver._active = before


class Driver:
    """What Triton calls of a driver."""

    def __init__(self, emulator: Emulator):
        self.emulator = emulator
        self.utils = Utilities()

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return Launcher(self.emulator, source, metadata)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.emulator.arch, 32)

    def get_current_device(self) -> int:
        return self.emulator.device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class Utilities:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return PROPERTIES

    def load_binary(self, name: str, binary: Any, shared: int, device: int) -> tuple[Any, ...]:
        """(module, function, registers, spills, threads at most); the function is the PTX itself.

        Without a module Triton would load the kernel at every launch.
        """
        return self, binary.decode() if isinstance(binary, bytes) else binary, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass


class Launcher:
    def __init__(self, emulator: Emulator, source: Any, metadata: Any):
        self.emulator, self.types = emulator, list(source.signature.values())
        self.shared = metadata.shared
        if metadata.num_ctas != 1 or metadata.global_scratch_size or metadata.launch_cooperative_grid:
            raise Unsupported(f"{metadata.name}: clusters, scratch buffers or cooperative launches")

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: str, packed: Any, metadata: Any,
        enter: Any, leave: Any, *values: Any,
    ) -> None:  # fmt: skip
        arguments = [
            (kind, value)
            for pair in zip(self.types, values, strict=True)
            for kind, value in flattened(*pair)
            if kind != "constexpr"
        ]
        if x * y * z:
            self.emulator.launch(function, (x, y, z), self.shared, arguments)


def _keep_ptx() -> None:
    """Triton's CUDA backend stops at PTX: no ptxas, and the PTX is what a launch gets."""
    backend = nvidia.CUDABackend
    if getattr(backend, "keeps_ptx", False):
        return
    initialise, add_stages = backend.__init__, backend.add_stages

    def __init__(self: Any, target: GPUTarget) -> None:
        initialise(self, target)
        if isinstance(triton.runtime.driver._active, Driver):
            self.binary_ext = "ptx"

    def stages(self: Any, found: Any, options: Any, language: Any) -> None:
        add_stages(self, found, options, language)
        if self.binary_ext == "ptx":
            found.pop("cubin")

    backend.__init__, backend.add_stages, backend.keeps_ptx = __init__, stages, True


def _compile_once() -> None:
    """Of processes that want the same kernel at the same time, as ranks do, one compiles it and the others
    find it in Triton's cache."""
    compile = triton.compiler.compile
    if hasattr(compile, "__wrapped__"):
        return

    @functools.wraps(compile)
    def alone(src: Any, *arguments: Any, **keywords: Any) -> Any:
        locks = Path(triton.knobs.cache.dir, "locks")
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / src.hash()).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return compile(src, *arguments, **keywords)

    triton.compiler.compile = alone
