PYTHON ?= python3
VENV ?= .venv
EXP ?= quickstart
ARGS ?=
JOBS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install exp resume sweep verify test test-all bench lint format docs tb clean

help:  ## Show this list
	@echo "mcit_lightning: continual instruction tuning on PyTorch Lightning"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  EXP=name   experiments/name.yaml: $(sort $(basename $(notdir $(wildcard experiments/*.yaml))))"
	@echo "             or a backbone, a benchmark and a strategy: EXP=llava7b+ucit+dmole (docs/benchmarks.md)"
	@echo "  ARGS=...   overrides, for example  make exp EXP=quickstart ARGS=\"optim.lr=2.0e-4 data.limit_train=64\""
	@echo "  JOBS=2         processes that share the fast tests"
	@echo "  PYTHON, VENV   interpreter to use (python3) and environment to make (.venv)"

install: $(STAMP)  ## Make .venv with everything that the experiments and the tests need

# torch goes first, at its pinned version, so that no other package's looser requirement chooses the build.
$(STAMP): setup.cfg pyproject.toml constraints.txt requirements-quickstart.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt torch
	$(BIN)/pip install -c constraints.txt -e ".[quickstart,captions,dev]"
	$(BIN)/pip install --no-deps -r requirements-quickstart.txt
	@touch $@

exp: $(STAMP)  ## Run the experiment EXP; a run that was stopped goes on where it was
	$(BIN)/python -m mcit_lightning $(EXP) $(ARGS)

resume: exp  ## The same as exp

sweep: $(STAMP)  ## Several strategies, task orders and seeds, compared: ARGS="strategies=sequential,dmole seeds=0,1,2 orders=2"
	$(BIN)/python -m mcit_lightning sweep $(EXP) $(ARGS)

verify: $(STAMP)  ## Check every row and picture of the experiment EXP, without the model
	$(BIN)/python -m mcit_lightning data verify $(EXP) $(ARGS)

test: $(STAMP)  ## Fast tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not gpu"

test-all: $(STAMP)  ## All tests: several processes, building a wheel, GPU where there is one
	$(BIN)/python -m pytest

bench: $(STAMP)  ## Measure on this machine and write the table of docs/performance.md (up to 15 minutes)
	$(BIN)/python benchmarks/bench.py $(ARGS)

lint: $(STAMP)  ## Style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Format the code and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## Write the reference pages docs/configuration.md and docs/callbacks.md from the code
	$(BIN)/python -m mcit_lightning.reference docs

tb: $(STAMP)  ## TensorBoard on runs/
	$(BIN)/tensorboard --logdir runs

clean:  ## Remove the environment and caches; runs/ stays
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
