# Sourced: source launch/setup_env.sh EXTRAS [TORCH]
#
# Puts the checkout's .venv, with this package and the named extras installed, first in PATH. Makes
# it if absent, makes it anew if it is broken or was left half-made, and installs again whenever
# pyproject.toml has changed. PYTHON names the interpreter to make it with (default: python3). With a
# version of torch, such as 2.11, the environment is .venv-2.11 and has that torch.

conda_dist_setup() {
    local extras=$1 python=${PYTHON:-python3}
    local root; root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    local venv=$root/.venv${2:+-$2} wanted
    local stamp=$venv/.installed-$1

    if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        if ! command -v "$python" >/dev/null; then
            echo "error: no $python in PATH; set PYTHON to a Python of version 3.11 or newer" >&2
            return 1
        fi
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "error: $(command -v "$python") is $("$python" --version 2>&1); version 3.11 or" \
                "newer is needed: set PYTHON to one" >&2
            return 1
        fi
        echo "making $venv" >&2
        "$python" -m venv --clear "$venv" || return
    fi

    # The stamp is written last, so an interrupted installation is repeated.
    wanted=$(cksum < "$root/pyproject.toml") || return
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing conda_dist[$extras] into $venv" >&2
        "$venv/bin/python" -m pip install --quiet --editable "$root[$extras]" ${2:+"torch==$2.*"} || return
        echo "$wanted" > "$stamp"
    fi
    PATH=$venv/bin:$PATH
}

conda_dist_setup "$@"
