# `make` lists the targets. `make all` and `make test` start from nothing: they create .venv, install and go on.
PYTHON ?= python3
RECIPE ?= recipes/digits/rar.yaml
STORE ?= store
WORKERS ?= 0
PROCESSES ?= 1
BIN := .venv/bin
LAUNCH = $(if $(filter-out 0 1,$(PROCESSES)),$(BIN)/torchrun --standalone --nproc-per-node $(PROCESSES) --no-python)
INSTALLED := .venv/.installed

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(INSTALLED): pyproject.toml smalti/pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ./smalti -e '.[dev]'
	@touch $@

install: $(INSTALLED)  ## create .venv with the tested set of versions

all: $(INSTALLED)  ## run a whole recipe: RECIPE=recipes/digits/rar.yaml STORE=store [IMAGES=DIR] [WORKERS=N] [PROCESSES=N]
	$(LAUNCH) $(BIN)/smalti run $(RECIPE) --store $(STORE) --workers $(WORKERS) $(if $(IMAGES),--images $(IMAGES))

test: $(INSTALLED)  ## run the tests (CPU, no network, minutes)
	$(BIN)/python -m pytest

check: $(INSTALLED)  ## ruff (format, lint), mypy strict, layering
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layering.py

bench: $(INSTALLED)  ## measure speed and memory as ratios within one run (idle machine)
	$(BIN)/python -m benchmarks

crash: $(INSTALLED)  ## kill every stage at 50 seeded moments and compare with undisturbed runs
	$(BIN)/python -m pytest -m crash --kills 50 --timeout 3600

clean:  ## remove .venv and caches; the store stays
	rm -rf .venv .mypy_cache .ruff_cache .hypothesis build smalti/build *.egg-info smalti/*.egg-info

clean-store:  ## remove the store with everything that was computed: STORE=store
	rm -rf $(STORE)

.PHONY: help install all test check bench crash clean clean-store
