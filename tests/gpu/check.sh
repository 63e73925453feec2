#!/usr/bin/env bash
# All checks that need a GPU: the tests, then the benchmark. About 8 minutes on an H100.
# PYTHON chooses the interpreter; results of the benchmark go into the folder $1 (benchmarks/ by default).
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
timeout 220 "$python" -m pytest -m gpu -n 0 --tb short --durations 10 tests/gpu
tests=$?
model=gpt2-medium
timeout 260 "$python" benchmarks/run.py --device cuda --model "$model" --repeats 1 --leave-out fp32 plain \
    --parts throughput main generation --output "${1:-benchmarks}" --cases "$model, 8 × short" "$model, 32 × short" \
    "$model, 2 × short" "$model, 4 × 1024" "$model, 16 × 1024" "$model, 1 prompt" "$model, 16 prompts"
exit $((tests || $?))
