"""Runs of verl's SFT trainer, one after another in the ranks of one torchrun: verl takes seconds to import.

    python -m torch.distributed.run --nproc-per-node=N verl_runs.py FOLDER

FOLDER/runs.json holds {name: [overrides of verl's configuration]}; each run leaves its log as
FOLDER/name.jsonl, its model in FOLDER/name, and what it raised as FOLDER/name.error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

ROOM = "deft_kernels.integrations.verl"


def overrides(folder: Path, output: Path) -> list[str]:
    """Three steps of plain SGD over the same eight samples each, in fp32, with attention that a CPU has."""
    return [
        f"data.train_files={folder}/data/train.parquet",
        "data.train_batch_size=8",
        "data.use_dynamic_bsz=False",
        "data.micro_batch_size_per_gpu=8",
        "data.num_workers=0",
        f"model.path={folder}/model",
        "+model.override_config.attn_implementation=sdpa",
        "engine.strategy=fsdp2",
        "+engine.mixed_precision={param_dtype:fp32}",
        "optim.optimizer=SGD",
        "optim.lr=0.1",
        "optim.weight_decay=0",
        "optim.clip_grad=1e6",
        "checkpoint.save_contents=[hf_model]",
        "trainer.device=cpu",
        "trainer.logger=[file]",
        "trainer.total_epochs=3",
        "trainer.total_training_steps=3",
        "trainer.resume_mode=disable",
        f"trainer.default_local_dir={output}",
    ]


def forget() -> None:
    """What verl's import of the flag's module did, so that the next run's flag does it anew."""
    if ROOM in sys.modules:
        sys.modules[ROOM].uninstall()
        for name in [ROOM, *(name for name in sys.modules if name.startswith("objective_"))]:
            del sys.modules[name]
        del sys.modules["deft_kernels.integrations"].verl


def main(folder: Path) -> None:
    import hydra
    from verl.trainer.sft_trainer import run_sft
    from verl.utils.distributed import destroy_global_process_group

    runs = json.loads((folder / "runs.json").read_text())
    for number, (name, settings) in enumerate(runs.items()):
        # Each run makes a process group of its own.
        rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
        store = f"{folder}/store{number}"
        os.environ["DIST_INIT_METHOD"] = f"file://{store}?rank={rank}&world_size={size}"
        os.environ["VERL_FILE_LOGGER_PATH"] = str(folder / f"{name}.jsonl")
        forget()
        try:
            with hydra.initialize_config_module("verl.trainer.config", version_base=None):
                run_sft(hydra.compose("sft_trainer_engine", settings))
        except Exception:
            (folder / f"{name}.error").write_text(traceback.format_exc())
            destroy_global_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
