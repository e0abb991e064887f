#!/usr/bin/env bash
# The whole check on one GPU, within 8 minutes: bash tests/gpu.sh OUT [section,...]
#
# Writes OUT/check.json and OUT/check.md, and exits with 1 if anything is out of its bounds. Without
# a GPU it rehearses itself at toy sizes on the CPU, in a minute. Needs torch 2.11 or newer,
# transformers and tokenizers in the Python that PYTHON names (default: python3). WHEELS may name a
# folder of wheels that this Python lacks, such as rich and pytorch_optimizer's, for machines
# without a network. The package is taken from this checkout, whatever is installed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${1:?usage: bash tests/gpu.sh OUT [section,...]}
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl
fi
# As it is installed: setuptools maps integrations/ and launch/ into conda_dist.
mkdir "$site/conda_dist"
cp -r "$root"/conda_dist/* "$site/conda_dist/"
cp -r "$root/integrations" "$root/launch" "$site/conda_dist/"

mkdir -p "$out"
export PYTHONPATH="$site:$root/tests/helpers:$root/tests/gpu"
export PYTHONSAFEPATH=1  # else -m would take the package from the current folder
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} HF_HUB_OFFLINE=1 MPLBACKEND=Agg
# What hangs is ended; what was found by then is written.
timeout --kill-after=5 "${LIMIT_S:-500}" "$python" "$root/tests/gpu/check.py" "$out" "${@:2}"
