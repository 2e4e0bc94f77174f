"""A CPU for verl, which knows accelerators only; it imports this module for VERL_USE_EXTERNAL_MODULES.

All that it stands in for is the device that is not here: its name and its memory, and gloo for its NCCL. The
trainer, its engines and what they do between the configuration and the optimizer step are verl's own.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import _init_utils
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

# VERL_ENGINE_DEVICE picks the engines that are registered for a GPU.
ENVIRONMENT = {
    "VERL_PLATFORM": "cpu",
    "VERL_USE_EXTERNAL_MODULES": "verl_cpu",
    "VERL_ENGINE_DEVICE": "cuda",
    "GLOO_SOCKET_IFNAME": "lo",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Device:
    """torch.cpu with the functions of torch.cuda that verl's logs and checkpoints call."""

    def memory_allocated(self, *_: Any) -> int:
        return 0

    memory_reserved = max_memory_allocated = max_memory_reserved = memory_allocated

    def mem_get_info(self) -> tuple[int, int]:
        return 0, 0

    def get_device_name(self) -> str:
        return "CPU"

    def set_device(self, _: Any) -> None:
        pass

    empty_cache = ipc_collect = lambda self: None

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


class Index(str):
    """The device where verl moves tensors, "cpu", and 0 where it writes "<name>:<index>"."""

    def __format__(self, spec: str) -> str:
        return "0"


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    device_name = "cpu"
    vendor_name = "none"
    device_module = Device()

    def is_available(self):
        return True

    def current_device(self):
        return Index("cpu")

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg):
        return contextlib.nullcontext()

    def profiler_start(self):
        pass

    profiler_stop = profiler_start

    def ray_resource_name(self):
        return "CPU"

    def ray_resource_options(self, num_gpus):
        return {"num_cpus": num_gpus}

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def cudart(self):
        return None


_init_process_group = torch.distributed.init_process_group


def init_process_group(backend: str | None = None, **settings: Any) -> None:
    """verl asks for "cpu:gloo,<device>:<its backend>", and names the CPU twice."""
    _init_process_group("gloo", **settings)


torch.distributed.init_process_group = init_process_group

# FSDP 1 copies rank 0's parameters to the others with a GPU's broadcast only; gloo's does it as well.
_init_utils._check_module_states_for_sync_module_states = lambda states: None


def flash_attention(query, key, value, mask, query_length, *_, position_ids, softmax_scale=None, **__):
    """The flash-attn kernel, over packed sequences [1, T, heads, D], whose positions begin at 0."""
    sequence = (position_ids[0] == 0).cumsum(0)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    allowed = (sequence[:, None] == sequence).tril()
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, scale=softmax_scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def attention(module, *states, **settings):
    """transformers' flash attention, in which verl puts its own for sequence parallelism."""
    from transformers.integrations import flash_attention as integration
    from verl.models.transformers import monkey_patch

    monkey_patch._flash_attention_forward = flash_attention
    return integration.flash_attention_forward(module, *states, **settings)


AttentionInterface.register("packed_cpu", attention)
AttentionMaskInterface.register("packed_cpu", flash_attention_mask)
