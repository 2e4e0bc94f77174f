#!/usr/bin/env bash
# Makes a virtual environment with one stack, as far as its loss needs it, and runs that stack's tests on the CPU:
#
#     tests/stacks/run.sh STACK [FOLDER]        llamafactory, axolotl, torchtitan, verl, megatron, nemo, swift, unsloth or deepspeed
#
# The stacks' own pins contradict each other, and some bring gigabytes of CUDA packages; so each has an environment
# of its own, torch comes first in the tested version, and the stack without its dependencies.
set -euo pipefail
cd "$(dirname "$0")/../.."

stack=${1:?usage: tests/stacks/run.sh STACK [FOLDER]}
folder=${2:-$(mktemp -d)/$stack}

case $stack in
    torchtitan)
        package="torchtitan==0.3.0"
        needs=(torchdata tyro einops tokenizers "datasets<4.8" pillow tensorboard torch_checkpointing spmd_types==0.2.3)
        ;;
    llamafactory)
        package="llamafactory==0.9.5"
        needs=(transformers==5.5.4 trl==0.24.0 peft==0.18.1 accelerate==1.11.0 datasets==4.0.0 omegaconf fire einops)
        needs+=(liger-kernel==0.8.1 jieba nltk rouge-chinese)
        ;;
    nemo)
        package="nemo-automodel==0.7.0"
        needs=(transformers==5.18.0 pyyaml datasets==5.2.0 torchdata torchao "mistral-common[hf-hub,sentencepiece]" tiktoken)
        ;;
    axolotl)
        # Its import needs most of what it pins; torch stays the one that is there.
        package="axolotl==0.19.0"
        needs=(axolotl==0.19.0)
        ;;
    verl)
        package="verl==0.9.1"
        needs=(accelerate codetiming "transformers>=5.5.3,<5.11" peft "tensordict>=0.8,<=0.10,!=0.9.0" hydra-core)
        needs+=(torchdata pandas pyarrow ray pylatexenc tensorboard datasets uvicorn fastapi)
        ;;
    megatron)
        package="megatron-core==0.16.1"
        needs=(packaging)
        ;;
    swift)
        package="ms-swift==4.6.0"
        needs=(ms-swift==4.6.0 transformers==5.19.0 trl==0.29.1)
        ;;
    unsloth)
        package="unsloth==2026.10.9"
        needs=(unsloth_zoo==2026.10.9 transformers==5.17.0 trl==1.15.0 peft datasets==4.8.5 typer rich structlog json5)
        needs+=(nest-asyncio pydantic pyyaml)
        ;;
    deepspeed)
        package="deepspeed==0.19.8"
        needs=(transformers==5.23.0 accelerate==1.15.0 hjson msgpack ninja py-cpuinfo pydantic psutil einops tqdm)
        needs+=(setuptools wheel)
        ;;
    *)
        echo "unknown stack: $stack" >&2
        exit 2
        ;;
esac

python3 -m venv "$folder"
pip=("$folder/bin/python" -m pip install -q)
"${pip[@]}" "$(grep '^torch==' constraints.txt)" "$(grep '^triton==' constraints.txt)" numpy pytest
"${pip[@]}" -c <(grep -E '^(torch|triton)==' constraints.txt) "${needs[@]}"
"${pip[@]}" --no-deps "$package" -e .
if [[ $stack == llamafactory ]]; then
    # It imports torchaudio, whose compiled library wants CUDA; without the library the import goes well.
    "${pip[@]}" --no-deps torchaudio
    rm -f "$folder"/lib/python3*/site-packages/torchaudio/lib/*.so
fi
OMP_NUM_THREADS=1 "$folder/bin/python" -m pytest -q "tests/stacks/test_$stack"*.py
