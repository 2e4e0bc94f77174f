#!/usr/bin/env bash
# Other packages' own tests of cross-entropy, run against objective="nll" of this one. Not a part of CI: it wants
# checkouts, which are nobody's to copy here, and what their tests import (pip install liger-kernel transformers
# expecttest; Apple's and PyTorch's need nothing else).
#
#   git clone --depth 1 https://github.com/linkedin/Liger-Kernel
#   git clone --depth 1 https://github.com/apple/ml-cross-entropy
#   git clone --depth 1 https://github.com/Dao-AILab/flash-attention
#   git clone --depth 1 --branch v2.13.0 https://github.com/pytorch/pytorch      # test/test_nn.py alone is enough
#
#   tests/peers/run.sh liger Liger-Kernel
#   tests/peers/run.sh apple ml-cross-entropy
#   tests/peers/run.sh flash flash-attention
#   tests/peers/run.sh pytorch pytorch/test/test_nn.py       # or a copy of it for another device
#   tests/peers/run.sh samples                               # PyTorch's sample inputs, out of its wheel
#
# Further arguments go to pytest: -k softcap, -x. PYTHON=.venv/bin/python chooses the interpreter, PEERS_BACKEND=triton
# the kernels (with TRITON_INTERPRET=1 where there is no GPU; Liger's 32,000 columns then take hours). Batches of
# thousands of rows are cut to 64. What differs and why is in known.py; a difference that has gone is an error.
set -euo pipefail
peer=$1
here=$(dirname "$(realpath "$0")")
shift
place=$here
if [ "$peer" != samples ]; then
    place=$(realpath "$1")
    shift
fi
python=$(realpath -s "${PYTHON:-python}")
case $peer in
    liger) folder=$place files="test/transformers/test_cross_entropy.py test/transformers/test_fused_linear_cross_entropy.py"
        path=$place/src:$place ;;
    apple) folder=$place files="tests/test_cce_loss_forward.py tests/test_cce_loss_backward.py" path=$place ;;
    flash) folder=$place files=tests/losses/test_cross_entropy.py path= ;;
    pytorch) folder=$(dirname "$place") files=$(basename "$place") path=$folder
        set -- -k "cross_entropy or CrossEntropy" "$@" ;;
    samples) folder=$here files=test_samples.py path= peer=pytorch ;;
    *) echo "unknown peer $peer: liger, apple, flash, pytorch or samples" >&2; exit 2 ;;
esac
cd "$folder"
# shellcheck disable=SC2086  # two files
PEER=$peer PYTHONPATH=$here:$here/../..:$path${PYTHONPATH:+:$PYTHONPATH} \
    exec "$python" -m pytest -c /dev/null --rootdir . -p peers_plugin -p no:cacheprovider -q $files "$@"
