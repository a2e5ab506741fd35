# archsmith: the commands of the project. `make demo` and `make test` work on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two cores and two workers: one thread each, so that tests neither fight for cores nor change their bits.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
# Every extra that a test uses; everything comes from the pinned list.
EXTRAS := onnx,tensorboard,tables,boost,optuna,evolve,dashboard,ray,sql,dev

.PHONY: help setup demo test test-all lint format bench gpu-data clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(STAMP): constraints.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e ".[$(EXTRAS)]"
	touch $(STAMP)

setup: $(STAMP)  ## create .venv with the exact versions of constraints.txt

demo: $(STAMP)  ## search, train, export and verify a network on real handwritten digits (under 3 minutes)
	$(BIN)/archsmith search --method atomnas --task digits --budget "macs<=0.4x" --out runs/demo

test: $(STAMP)  ## the default test suite
	$(PYTEST)

test-all: $(STAMP)  ## every test, the slow evidence too
	$(PYTEST) -m "not gpu"

lint: $(STAMP)  ## format, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## rewrite the files in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP)  ## the ratio tables of benchmarks/
	for f in benchmarks/[a-z]*.py; do $(BIN)/python $$f || exit 1; done

gpu-data: $(STAMP)  ## pack the complete CIFAR-10 (DATA=npz) into two files of at most 50 MiB for a machine with a GPU
	$(if $(DATA),,$(error make gpu-data needs DATA=path/to/cifar10.npz))
	$(BIN)/python benchmarks/evidence/gpu_data.py pack $(DATA) data/gpu

clean:  ## remove what the commands made, runs excepted
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
