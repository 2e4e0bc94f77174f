"""ms-swift's own sft_main, with the lines of docs/integrations/swift.md as its external plugin.

As a script, one rank of two:
python -m torch.distributed.run --nproc-per-node=2 swift_runs.py FOLDER OUTPUT '{"setting": "value"}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from files import ALPACA, Observer, save
from pages import blocks


def prepare(folder: Path) -> None:
    """The tiny model and examples, in ms-swift's own format too, and the page's plugin as a file."""
    save(folder)
    rows = [
        {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["output"]},
            ],
            "channel": "code" if i % 3 else "mathematics",
        }
        for i, row in enumerate(ALPACA)
    ]
    (folder / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "plugin.py").write_text(blocks("swift")[0])


def trained(folder: Path, output: Path, **settings: Any) -> Observer:
    """Three steps over all eight examples; the settings are those of `swift sft`."""
    from swift import SftArguments, sft_main
    from swift.callbacks import callbacks_map

    observer = Observer()
    callbacks_map["observer"] = lambda args, trainer: observer
    args = {
        "model": str(folder / "model"),
        "model_type": "llama",
        "template": "default",
        "dataset": [str(folder / "data" / "rows.jsonl")],
        "split_dataset_ratio": 0.0,
        "external_plugins": [str(folder / "plugin.py")],
        "loss_type": "deft",
        "callbacks": ["deft", "observer"],
        "tuner_type": "full",
        "torch_dtype": "float32",
        "output_dir": str(output),
        "add_version": False,
        "use_hf": True,
        "check_model": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "dataloader_num_workers": 0,
        "gradient_checkpointing": False,
        **settings,
    }
    sft_main(SftArguments(**args))
    return observer


if __name__ == "__main__":
    output = Path(sys.argv[2])
    run = trained(Path(sys.argv[1]), output, **json.loads(sys.argv[3]))
    (output / f"logs{run.rank}.json").write_text(json.dumps(run.logs))
