"""NeMo AutoModel's recipe on a CPU: the device it lacks, and its YAML around the page's `loss_fn` block.

`run(folder, ...)` is its fine-tuning recipe in this process. As a script this file is one rank of several:
automodel.py FOLDER RUN..., each run a JSON object of what differs in the YAML.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from pages import blocks

# NeMo asks for the memory and the number of a GPU, and moves the model there.
torch.cuda.reset_peak_memory_stats = lambda device=None: None
torch.cuda.current_device = lambda: torch.device("cpu")
# Its Triton kernels are for that GPU, and triton 3.9 rejects one of them when NeMo is imported.
triton, sys.modules["triton"] = sys.modules.get("triton"), None  # type: ignore[assignment]
try:
    from nemo_automodel._transformers import auto_model
    from nemo_automodel.components.config.loader import load_yaml_config
    from nemo_automodel.recipes.llm import train_ft
finally:
    del sys.modules["triton"]
    if triton is not None:
        sys.modules["triton"] = triton


class OnCPU:
    """`torch` in the module that builds models, without `torch.device("cuda", ...)`."""

    device = staticmethod(lambda *_: torch.device("cpu"))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


auto_model.torch = train_ft.torch = OnCPU()

RECIPE = """
step_scheduler:
  global_batch_size: 8
  local_batch_size: 8
  max_steps: 3
  num_epochs: 3
  val_every_steps: 1
dist_env:
  backend: gloo
model:
  _target_: nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained
  pretrained_model_name_or_path: FOLDER/model
  torch_dtype: float32
  backend: {rms_norm: torch}  # the default is compiled, which takes half a minute
distributed:
  strategy: fsdp2
  mp_policy:  # its default computes in bfloat16 as soon as there are two ranks
    _target_: torch.distributed.fsdp.MixedPrecisionPolicy
    param_dtype: float32
    reduce_dtype: float32
checkpoint:
  enabled: false
  checkpoint_dir: FOLDER/out
dataset: &data
  _target_: DATASETS.column_mapped_text_instruction_dataset.ColumnMappedTextInstructionDataset
  path_or_dataset_id: FOLDER/data/alpaca.jsonl
  column_mapping: {question: instruction, answer: output}
validation_dataset: *data
dataloader:
  shuffle: false
optimizer:
  _target_: torch.optim.SGD
  lr: 0.02
"""


def recipe(folder: Path, changes: dict[str, Any]) -> Any:
    """The recipe, set up from the YAML; a change whose value is None takes its section out."""
    text = RECIPE.replace("FOLDER", str(folder)).replace("DATASETS", "nemo_automodel.components.datasets.llm")
    settings = yaml.safe_load(text + blocks("nemo", "yaml")[0])
    for name, change in changes.items():
        *path, last = name.split(".")
        section = settings
        for part in path:
            section = section[part]
        section[last] = change
    path = folder / f"recipe.{os.environ.get('RANK', 0)}.yaml"  # each rank's own: none reads another's half
    path.write_text(yaml.safe_dump(settings))
    # As train_ft.main does, which does not return its trainer.
    trainer = train_ft.TrainFinetuneRecipeForNextTokenPrediction(load_yaml_config(path))
    trainer.setup()
    return trainer


def run(folder: Path, **changes: Any) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """The losses of the steps and of the validations, not rounded, and the parameters at the end."""
    return finished(recipe(folder, changes), folder)


def finished(trainer: Any, folder: Path) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    trainer.run_train_validation_loop()
    parameters = {}
    for name, p in trainer.model_parts[0].named_parameters():
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p
        parameters[name] = whole.detach().clone()
    logs: list[list[float]] = [[], []]
    for log, name, key in zip(logs, ("training", "validation"), ("loss", "val_loss"), strict=True):
        file = folder / "out" / f"{name}.jsonl"
        if trainer.dist_env.is_main and file.exists():
            log.extend(json.loads(line)[key] for line in file.read_text().splitlines())
            file.unlink()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return logs[0], logs[1], parameters


if __name__ == "__main__":
    at = Path(sys.argv[1])
    results = []
    for changes in map(json.loads, sys.argv[2:]):
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # which remembers the last process group
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        results.append(run(at, **changes))
    if os.environ["RANK"] == "0":
        torch.save(results, at / "ranks.pt")
