# Two commands set everything up on a machine with Python >= 3.11, pip and make:
#   make quickstart   .venv, clipkit, and the main job on the embedded glyphs
#   make test         the same with the development tools, then the tests
#   make test-faults  a thousand kills: every one of them has to leave a run that goes on bit for bit
#   make test-gpu     on a machine with a CUDA device: bf16, golden embeddings and resume there
#   make test-full    with the whole matrix of the training step: every loss, target, mode, precision and number of ranks
PYTHON ?= python3
BIN := .venv/bin
UV := $(shell command -v uv 2>/dev/null)
PIP := $(if $(UV),$(UV) pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet --disable-pip-version-check)

# Test files are shared out over the cores; torch is held to one thread in each.
PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-full test-faults test-gpu check format clean

quickstart: .venv/installed
	$(BIN)/clipkit quickstart --overwrite

test: .venv/installed-dev
	$(PYTEST)

test-full: .venv/installed-dev
	$(PYTEST) -m "not faults and not gpu"

test-gpu: .venv/installed-dev
	$(BIN)/pytest -m gpu -rs tests/gpu

test-faults: .venv/installed-dev
	$(BIN)/pytest -m faults tests/training

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

.venv/python-ready:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "clipkit needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(if $(UV),true,$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  v=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	  echo "$(PYTHON) cannot make a virtual environment: its ensurepip is missing. On Debian or Ubuntu: apt install python$$v-venv"; exit 1; })
	@echo "creating .venv with $$($(PYTHON) --version)$(if $(UV), and uv)"
	@$(if $(UV),$(UV) venv --quiet --allow-existing --python $$(command -v $(PYTHON)) .venv,$(PYTHON) -m venv .venv)
	@$(if $(UV),true,$(PIP) --upgrade pip)
	@touch $@

.venv/installed: pyproject.toml constraints.txt | .venv/python-ready
	@echo "installing clipkit and what it needs (torch is large: some minutes on a slow line)"
	@$(PIP) --constraint constraints.txt --editable .
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "installing the development tools"
	@$(PIP) --constraint constraints.txt --editable . --group dev
	@touch $@
