"""LLaMA-Factory's own run_exp, called by the lines on docs/integrations/llamafactory.md.

As a script, one rank of two:
python -m torch.distributed.run --nproc-per-node=2 llamafactory_runs.py FOLDER OUTPUT '{"setting": "value"}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from files import Observer
from pages import run_block


def trained(folder: Path, output: Path, block: int = 0, **settings: Any) -> Observer:
    """Three steps over all eight examples of `folder`, by a block of the page; the settings are those of
    LLaMA-Factory's YAML."""
    observer = Observer()
    args = {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": str(folder / "model"),
        "dataset": "tiny",
        "dataset_dir": str(folder / "data"),
        "template": "default",
        "output_dir": str(output),
        "preprocessing_num_workers": 1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        **settings,
    }
    run_block("llamafactory", block, {"args": args, "callbacks": [observer]})
    return observer


if __name__ == "__main__":
    output = Path(sys.argv[2])
    run = trained(Path(sys.argv[1]), output, **json.loads(sys.argv[3]))
    (output / f"logs{run.rank}.json").write_text(json.dumps(run.logs))
