#!/usr/bin/env bash
# Type-checks the package as it is installed: setuptools maps integrations/ and launch/ into
# conda_dist, which mypy cannot see through an editable install, so a tree of links shows it.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir "$tree/conda_dist"
ln -s "$root"/conda_dist/* "$tree/conda_dist/"
ln -s "$root/integrations" "$root/launch" "$tree/conda_dist/"
cd "$root"
MYPYPATH=$tree python -m mypy -p conda_dist "$@"
