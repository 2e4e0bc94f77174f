"""Other packages' cross-entropy kernels in Triton, compiled as their launchers would launch them."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
from ahead_of_time import ITEMSIZE, TARGETS, Compiled, build
from triton.compiler import ASTSource


class Missing(Exception):
    """A peer that is not compiled, and why."""


@dataclass(frozen=True)
class PeerKernel:
    package: str  # its name on the package index
    kernel: str
    objective: str  # what of a row it computes
    compile: Callable[[str, str, int], Compiled]  # (arch, dtype, vocabulary)

    @property
    def version(self) -> str:
        return importlib.metadata.version(self.package)


def _imported(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"not installed ({error})") from error


def _program(kernel: Any, given: dict[str, Any], pointers: dict[str, str]) -> ASTSource:
    """Arguments as Triton's launcher would specialise them: None, 1 and constexprs are part of the code, a
    multiple of 16 is told to the compiler. Pointers are 16-byte aligned."""
    unknown = [p.name for p in kernel.params if p.name not in given and p.name not in pointers]
    if unknown:
        raise Missing(f"its kernel has arguments this script does not know: {', '.join(unknown)}")
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[Any]] = {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in pointers:
            signature[name] = f"*{pointers[name]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
            continue
        value = given[name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)


def _liger(arch: str, dtype: str, vocabulary: int) -> Compiled:
    """A row's statistics and gradient in one kernel; block and warps as its `cross_entropy_forward` picks."""
    module = _imported("liger_kernel.ops.cross_entropy")
    rows = 4099  # of ordinary size and no multiple of 16
    given = {
        "X_stride": vocabulary, "Y_stride": 1, "weight_ptr": None, "z_loss_ptr": None, "loss_stride": 1,
        "token_accuracy_ptr": None, "token_accuracy_stride": 0, "predicted_tokens_ptr": None,
        "predicted_tokens_stride": 0, "n_cols": vocabulary, "n_non_ignore": rows,
        "sum_non_ignore_weight": rows, "weight_sum": 0.0, "ignore_index": -100, "lse_square_scale": 0.0,
        "label_smoothing": 0.0, "reduction": "mean", "softcap": None, "RETURN_Z_LOSS": False,
        "RETURN_TOKEN_ACCURACY": False, "RETURN_PREDICTED_TOKENS": False, "HAS_WEIGHT": False,
        "HAS_SOFTCAPPING": False, "HAS_GRADIENTS": True,
        "BLOCK_SIZE": min(module.MAX_FUSED_SIZE, triton.next_power_of_2(vocabulary)),
    }  # fmt: skip
    pointers = {"X_ptr": dtype, "Y_ptr": "i64", "loss_ptr": dtype}
    num_warps = 8 if arch == "100" and ITEMSIZE[dtype] == 2 else 32
    program = _program(module.liger_cross_entropy_kernel, given, pointers)
    return _built(program, arch, num_warps)


def _trl(direction: str, entropy: bool) -> Callable[[str, str, int], Compiled]:
    """TRL's chunked log-prob head over a tile of the vocabulary, in the dtype of the hidden states: log p and
    log sum p^2, with entropy or without; backward of log p, for which a program has no loop but one block."""

    def compile_one(arch: str, dtype: str, vocabulary: int) -> Compiled:
        module = _imported("trl.kernels.chunked_logprob")
        given = {
            "mm_stride": 8192, "vocab_start": 8192, "n_cols": 8192, "logit_scale": 1.0, "softcap": 1.0,
            "inv_t": 1.0, "HAS_SOFTCAP": False, "HAS_ENTROPY": entropy, "HAS_LOG_SUM_SQ_PROBS": True,
            "HAS_MEAN_LOGITS": False, "HAS_IS_TOP1": False, "HAS_LOGPROB_GRAD": True,
            "HAS_ENTROPY_GRAD": entropy, "BLOCK_SIZE": module._BLOCK_SIZE,
        }  # fmt: skip
        rows = (
            "max_ptr", "sum_exp_ptr", "x_sum_exp_ptr", "sq_sum_exp_ptr", "z_sum_ptr", "max_before_target_ptr",
            "target_logit_ptr", "log_z_ptr", "entropy_ptr", "grad_logprobs_ptr", "grad_entropy_ptr",
        )  # fmt: skip
        pointers = {"mm_ptr": dtype, "targets_ptr": "i64"} | dict.fromkeys(rows, "fp32")
        kernel = getattr(module, f"_{direction}_kernel")
        return _built(_program(kernel, given, pointers), arch, num_warps=4)

    return compile_one


def _built(program: ASTSource, arch: str, num_warps: int) -> Compiled:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's defaults, which are the peer's choice
        return build(program, TARGETS[arch], {"num_warps": num_warps})


PEERS = (
    PeerKernel("liger-kernel", "liger_cross_entropy", "nll", _liger),
    PeerKernel("trl", "trl_chunked_logprob", "log p, S", _trl("forward", entropy=False)),
    PeerKernel("trl", "trl_chunked_logprob", "log p, S, H", _trl("forward", entropy=True)),
    PeerKernel("trl", "trl_chunked_logprob", "log p", _trl("backward", entropy=False)),
)
