# The whole kit from a fresh clone:  make reproduce   (then: make ui)      make test
# Everything else:  make help

PYTHON ?= python3
PARAMS ?= params/tiny.yaml
# conda or mamba where there is one; `make env CONDA=` builds a plain .venv all the same
CONDA  ?= $(shell command -v mamba || command -v conda)
PORT   ?= 5000
UV     ?= uv
# `make env NPU=1` adds the torch_npu of pyproject's npu extra, and takes torch's build for CPUs from
# torch's own index: beside PyPI's, which are for CUDA on x86_64 and aarch64, torch_npu refuses to be
# imported.
NPU    ?=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

ENV := $(if $(strip $(CONDA)),.conda,.venv)
BIN := $(ENV)/bin
INSTALLED := $(ENV)/.installed$(if $(strip $(NPU)),-npu)
TORCH_BUILD := $(if $(strip $(NPU)),--extra-index-url $(TORCH_INDEX))

.PHONY: help env reproduce test lab ui lint format lock clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

env: $(INSTALLED)  ## the environment, built again when the lock changes (NPU=1: for Ascend)

reproduce: env  ## the six notebooks on the tiny experiment (or PARAMS=…)
	$(BIN)/internlm run $(PARAMS)

# One file is one worker's work, in the order of the folders: the longest come first.
test: env  ## all tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lab: env  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --ip 127.0.0.1 notebooks

ui: env  ## the MLflow user interface on this kit's runs
	$(BIN)/internlm ui --port $(PORT)

lint: env  ## style (notebooks included) and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env  ## rewrite to the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch itself pins the CUDA packages its build needs, and its CPU build needs none: they are left
# out, so that one lock installs beside either build.
lock:  ## requirements.lock from pyproject.toml, newest versions (needs uv)
	$(UV) pip compile pyproject.toml --extra dev --universal --python-version 3.10 \
		--no-emit-index-url --no-annotate --no-header --quiet -o requirements.lock.all
	grep -vE '^(nvidia|cuda|triton)\b' requirements.lock.all > requirements.lock
	rm requirements.lock.all

clean:  ## remove environments and caches; runs/, reports/ and mlflow/ stay
	rm -rf .venv .conda build *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.installed: requirements.lock pyproject.toml
	@set -e; for python in $(PYTHON) python3.11 python3.12 python3.10; do \
	    if "$$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' \
	        2>/dev/null; then found="$$python"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "make env: Python 3.10, 3.11 or 3.12 is needed; $(PYTHON) is" \
	        "$$($(PYTHON) --version 2>&1 || true)." \
	        "Install one and say: make env PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	if [ ! -x .venv/bin/pip ]; then \
	    "$$found" -m venv .venv || { echo "make env: $$found has no venv module" \
	        "(Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }; \
	fi
	.venv/bin/python -m pip install $(TORCH_BUILD) -r requirements.lock
	$(finish_environment)

.conda/.installed: requirements.lock pyproject.toml environment.yml
	$(if $(TORCH_BUILD),PIP_EXTRA_INDEX_URL=$(TORCH_INDEX)) $(CONDA) env $(if $(wildcard .conda/bin/python),update,create) --prefix ./.conda --file environment.yml
	$(finish_environment)

define finish_environment
$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
$(BIN)/python -m ipykernel install --sys-prefix --name internlm --display-name "InternLM kit"
touch $@
endef

# An environment that was built without NPU=1 may have torch's build for CUDA: it is replaced.
$(ENV)/.installed-npu: $(ENV)/.installed
	$(BIN)/python -m pip install $(TORCH_BUILD) \
	    "$$(sed -n 's/^torch==\([0-9.]*\).*/torch==\1+cpu/p' requirements.lock)" \
	    "$$(sed -n 's/^npu = \["\(.*\)"\]/\1/p' pyproject.toml)"
	touch $@
