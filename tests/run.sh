#!/usr/bin/env bash
# Everything that must pass: bash tests/run.sh [pytest arguments]
#
# Makes .venv in the checkout if absent, installs the package with the dev extra, lints,
# type-checks and runs the tests. Arguments go to pytest: bash tests/run.sh tests/test_golden.py
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/setup_env.sh" dev
cd "$root"

# Several processes share few cores here: more threads in each would only get in the way.
export OMP_NUM_THREADS=1 MPLBACKEND=Agg HF_HUB_OFFLINE=1
# DeepSpeed compiles for the Python it runs in; checkouts that share its cache do so in turns.
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$root/.venv/torch_extensions}

# One that takes half a minute, while the types are checked.
shm=deepspeed_shm_comm
if [ ! -e "$TORCH_EXTENSIONS_DIR/$shm/$shm.so" ]; then
    DS_ACCELERATOR=cpu python -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()' \
        >/dev/null 2>&1 &
fi

ruff check .
ruff format --check .
bash tests/typecheck.sh
wait
exec python -m pytest "$@"
