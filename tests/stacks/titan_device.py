"""What torchtitan's trainer does not find on a machine without a GPU; to be imported before torchtitan."""

from __future__ import annotations

import types

import torch
import torch.distributed.distributed_c10d
from torch.distributed.fsdp import FSDPModule

# It takes its device when it is imported, from torch's accelerators, among which no CPU is, and logs the
# device's name, number and memory. With a CPU named, the rest of torchtitan and of torch.cpu is as it is.
torch._utils._get_available_device_type = lambda: "cpu"
torch.cpu.current_device = lambda: 0
torch.cpu.get_device_name = lambda device=None: "CPU"
torch.cpu.get_device_properties = lambda device=None: types.SimpleNamespace(total_memory=1)
torch.cpu.memory_stats = lambda device=None: {}
torch.cpu.reset_peak_memory_stats = torch.cpu.empty_cache = lambda: None
# torchtitan 0.3.0 shortens the collectives' timeout after the first step, by a call that torch 2.13.0 has
# under another name.
if not hasattr(torch.distributed, "set_timeout"):
    torch.distributed.set_timeout = torch.distributed.distributed_c10d._set_pg_timeout
# FSDP2 asks the collectives for a scaled sum, here scaled by 1, which gloo has not got: a plain sum instead.
divide = FSDPModule.set_gradient_divide_factor
FSDPModule.set_gradient_divide_factor = lambda self, factor: (
    divide(self, factor),
    self.set_force_sum_reduction_for_comms(True),
)
