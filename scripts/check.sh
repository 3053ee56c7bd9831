#!/usr/bin/env bash
# Lint, format, types, layers: everything that is known without running the code.
set -euo pipefail
cd "$(dirname "$0")/.."
bin="${VENV:-.venv}/bin"

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/mypy" benchmarks/bars.py
"$bin/python" -m pytest -q tests/unit/test_layers.py
