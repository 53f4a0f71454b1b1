# make demo and make test each work alone on a fresh clone; all they need is Python >= 3.11 and make.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
DEMO := runs/demo
DEMO_MINUTES ?= 7
# An older Triton beside the newest one, the one PyTorch 2.11 brings: what one compiler sees the other one may not.
OLDER := 3.6.0

# Threads that wait without spinning: as fast on an idle machine, and several times faster on a busy one.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint bench clean

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 14

setup: $(READY) ## create .venv and install the library with its tools

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python >= 3.11 found; set PYTHON=/path/to/python3" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## train a small model on real English, let it write, and compare it (about 10 minutes on 2 cores)
	$(BIN)/hla train --size tiny --minutes $(DEMO_MINUTES) --out $(DEMO) --overwrite
	$(BIN)/hla generate $(DEMO) "Fellow citizens, the state of our Union" --max-tokens 150 --temperature 0.7 --top-p 0.9 --seed 1
	$(BIN)/hla evaluate $(DEMO) --reference benchmarks/results/demo_softmax.json

# Tests of several processes run by themselves: they share a pool, and time-outs. The others share the cores; a few of
# them run again with an older compiler. None of them sees a GPU, on which the kernels would not be interpreted; those
# that need one come last.
test: lint ## lint, then run all tests
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal --ignore tests/distributed --ignore tests/gpu
ifeq ($(shell uname -s),Linux)
	@test -f $(VENV)/triton-$(OLDER)/ready || { \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/triton-$(OLDER) triton==$(OLDER) && \
		touch $(VENV)/triton-$(OLDER)/ready; }
	CUDA_VISIBLE_DEVICES= PYTHONPATH=$(VENV)/triton-$(OLDER) $(BIN)/python -m pytest tests/kernels/test_offline.py -k "stream or hopper"
endif
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest tests/distributed
	$(BIN)/python -m pytest tests/gpu

lint: $(READY) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## time the operators against softmax attention
	$(BIN)/python -m benchmarks.ops

clean: ## remove the environment, caches and runs
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
