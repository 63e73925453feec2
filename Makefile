# The two commands of the README, from nothing but Python and make. PYTHON=python3.12 chooses another interpreter.
# TORCH=cpu takes PyTorch without CUDA, from PyTorch's own index, when .venv is made; TORCH=cu130 and the like work too.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet $(if $(TORCH),--extra-index-url https://download.pytorch.org/whl/$(TORCH))

.PHONY: finetune test lint clean

finetune: .venv/installed
	$(BIN)/python finetune.py $(ARGS)

test: .venv/installed-dev lint
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --requirement requirements.txt
	touch $@

.venv/installed-dev: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --requirement requirements-dev.txt
	touch .venv/installed $@

clean:
	rm -rf .venv cpu/.venv
