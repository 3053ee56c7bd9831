#!/usr/bin/env bash
# Builds the environment in $VENV (default: .venv): the locked packages, then kvshare itself, editable, with its C extension.
# Silent and quick when nothing changed.
set -euo pipefail
cd "$(dirname "$0")/.."
venv="${VENV:-.venv}"

fail() {
    echo "kvshare: $1" >&2
    exit 1
}

# Python 3.11 with venv and with the headers that the extension is compiled against.
usable() {
    "$1" -c '
import ensurepip, os, sys, sysconfig, venv
headers = os.path.join(sysconfig.get_path("include"), "Python.h")
sys.exit(not (sys.version_info[:2] == (3, 11) and os.path.exists(headers)))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON311:-} $(type -ap python3.11 python3); do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no usable Python 3.11 found (with venv and headers): install python3.11, python3.11-venv and python3.11-dev, or say PYTHON311=/path/to/python3.11"
}

packages="$(sha256sum <requirements.lock)"
project="$(cat pyproject.toml kvshare/*.[ch] | sha256sum) $PWD"

if [[ "$(cat "$venv/packages.stamp" 2>/dev/null)" != "$packages" ]]; then
    python="$(find_python)"
    echo "kvshare: building the environment in $venv with $python (a few minutes, once)" >&2
    rm -f "$venv/packages.stamp" "$venv/project.stamp"
    "$python" -m venv "$venv"
    "$venv/bin/pip" install -qq --disable-pip-version-check --no-deps -r requirements.lock
    # The default index serves torch for CUDA, which cannot be imported without CUDA's libraries.
    "$venv/bin/python" -c 'import torch' 2>/dev/null ||
        fail "torch cannot be imported: its CPU build comes from PyTorch's own CPU index; set PIP_EXTRA_INDEX_URL to that and try again"
    echo "$packages" >"$venv/packages.stamp"
fi

if [[ "$(cat "$venv/project.stamp" 2>/dev/null)" != "$project" ]]; then
    command -v "${CC:-gcc}" >/dev/null || fail "no C compiler found: install gcc, or name one with CC"
    "$venv/bin/pip" install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
    echo "$project" >"$venv/project.stamp"
fi
