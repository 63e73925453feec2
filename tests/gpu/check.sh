#!/usr/bin/env bash
# Run all checks that need a GPU: the tests, then the benchmark. They take about 8 minutes on an H100.
# PYTHON sets the interpreter, $1 the folder for the benchmark's results (benchmarks/ by default).
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
# On INT, pytest and the benchmark report what they have.
timeout -s INT 220 "$python" -m pytest -m gpu -n 8 --dist load -vv --tb short --durations 10 \
    tests/gpu/test_step_on_gpu.py tests/gpu/test_runs_on_gpu.py
tests=$?
timeout -s INT 250 "$python" benchmarks/run.py --device cuda --repeats 1 --leave-out fp32 plain \
    --parts throughput main --cases gpt2-medium --output "${1:-benchmarks}"
exit $((tests || $?))
