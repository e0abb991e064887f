#!/usr/bin/env bash
# The oldest torch that pyproject.toml allows: bash tests/oldest.sh [pytest arguments]
#
# Makes .venv-VERSION in the checkout if absent, with that torch, and runs the modules that use most
# of torch there; with arguments, what they name.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
version=$(sed -n 's/^dependencies = \["torch>=\([0-9.]*\)".*/\1/p' "$root/pyproject.toml")
: "${version:?pyproject.toml names no oldest torch as its first dependency}"
if ! source "$root/launch/setup_env.sh" train,deepspeed,test "$version"; then
    # An index without that torch is no fault of the code; see .ci/run. All else is.
    there=$("$root/.venv-$version/bin/python" -m pip index versions torch) || exit 1
    grep -Eq "[:,] *${version//./\\.}[.+,]" <<<"$there," || exit 69
    exit 1
fi
cd "$root"

unset PYTHONDONTWRITEBYTECODE
export OMP_NUM_THREADS=1 MPLBACKEND=Agg HF_HUB_OFFLINE=1
export TORCH_EXTENSIONS_DIR=$root/.venv-$version/torch_extensions
python - "$version" <<'END'
import sys, torch
print("torch", torch.__version__)
if not f"{torch.__version__}.".replace("+", ".").startswith(f"{sys.argv[1]}."):
    sys.exit(f"error: this is not torch {sys.argv[1]}; remove its environment")
END
if [ $# -eq 0 ]; then
    set -- tests/numerics/test_golden.py tests/optimizer/test_parity.py tests/runtime/test_fsdp.py \
        tests/state/test_checkpoint.py tests/state/test_checkpoint_full.py -n 2 --dist loadfile
fi
exec python -m pytest "$@"
