# make demo | test | lint | bench | peers | clean: every target makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
PEERS ?= .peers
THREADS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

export PYTHONHASHSEED := 0

.DEFAULT_GOAL := help
.PHONY: help install install-dev demo test lint format bench peers clean

help:
	@echo "make demo    invert an embedded seismic section, write demo/report.html"
	@echo "make test    the whole test suite"
	@echo "make lint    ruff, ruff format, mypy"
	@echo "make format  let ruff repair what it can"
	@echo "make bench   all benchmarks, write benchmarks/RESULTS.md"
	@echo "make peers   an environment of its own ($(PEERS)) with the libraries that benchmarks compare against"
	@echo "make clean   remove environments, caches and outputs"

# The stamps make a second call immediate; a changed pyproject.toml or constraints.txt installs again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "invgen needs Python 3.11 or newer; call make PYTHON=/path/to/it"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.installed

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

demo: $(VENV)/.installed
	$(BIN)/invgen demo --out demo

# One thread a worker: two workers share two cores without fighting over them.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(THREADS) $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/run_all.py $(ARGS)

# Peers are compared against, never imported by invgen or its tests; they may want other versions than it does.
$(PEERS)/.installed: pyproject.toml
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet torch==2.13.0 deepinv azula pylops cuqipy pyro-ppl caustics gstools gstlearn -e .
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps sbibm==1.1.0 # its files only: it wants an old sbi
	touch $@

peers: $(PEERS)/.installed

clean:
	rm -rf $(VENV) $(PEERS) demo out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
