# Everything a machine with only Python (>= 3.10) and make needs. Other interpreter: make test PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
# Passed to pip, for example an index of CPU-only builds of torch.
PIP_ARGS ?=
# Passed to `d2c demo`.
DEMO_ARGS ?=
# CIFAR-10's 50,000 training images as Parquet, for the benchmark, and where it works.
IMAGES ?= cifar10-train.parquet
BENCH_OUT ?= bench
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist loadfile

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Idle OpenMP threads that spin slow down every other process on a small machine.
export OMP_WAIT_POLICY ?= PASSIVE
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: help venv demo test lint format bench-a
help:
	@echo "make demo    the whole path on handwritten digits, in minutes on a CPU"
	@echo "make test    every check and every test"
	@echo "make lint    ruff, mypy and the import contracts only"
	@echo "make bench-a IMAGES=FILE  rules of selection on CIFAR-10, by distance; compares with the published figures"
	@echo "make format  rewrite the sources as ruff formats them"
	@echo "make venv    create $(VENV) and install d2c-toolkit with the tested versions"

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || \
	  { echo "error: $(PYTHON) not found. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), but 3.10 or newer is needed." >&2; \
	    echo "       Name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || \
	  { echo "error: $(PYTHON) cannot create a virtual environment; the module venv or ensurepip is missing." >&2; \
	    echo "       On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Installing into $(VENV) (the first time this downloads torch: minutes)" >&2
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/d2c demo $(DEMO_ARGS)

# One OpenMP thread for each test process: the processes already fill the cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

bench-a: $(STAMP)
	@test -e '$(IMAGES)' || { echo "error: $(IMAGES) not found. Name CIFAR-10's training images: make bench-a IMAGES=FILE" >&2; exit 1; }
	PYTHONPATH=. $(BIN)/python docs/benchmarks/bench.py '$(BENCH_OUT)' --images '$(IMAGES)' --level a \
	  --only '^a-(?!ot-(50|100)$$)'
	PYTHONPATH=. $(BIN)/python docs/benchmarks/bench_compare.py '$(BENCH_OUT)' cifar10

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
