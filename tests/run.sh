#!/usr/bin/env bash
# Everything that must pass: bash tests/run.sh [--quick | pytest arguments]
#
# Makes .venv in the checkout if absent, installs the package with the dev extra, lints,
# type-checks and runs the tests, several modules at a time. With --quick it leaves out what
# CONTRIBUTING.md says. Other arguments go to pytest, which then runs one module at a time:
# bash tests/run.sh tests/numerics/test_golden.py
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
source "$root/launch/setup_env.sh" dev
cd "$root"

# Several processes share few cores here: more threads in each would only get in the way.
unset PYTHONDONTWRITEBYTECODE # or each process that a test starts compiles the package anew
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
if [ $# -gt 0 ] && [ "$*" != --quick ]; then
    exec python -m pytest "$@"
fi
# Two more than there are cores: tests wait for watchdogs, for processes and for each other. Modules
# in the order that conftest.py gives them, not the plugin's.
workers=$(($(nproc) < 7 ? $(nproc) + 2 : 8))
exec python -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
