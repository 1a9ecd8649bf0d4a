# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup demo test test-real lint bench bench-gpu clean

setup: $(VENV)/ready  ## a virtual environment with ia2mini, all extras and the tested versions

$(VENV)/ready: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools wheel
	$(INSTALL) torch
	$(INSTALL) --no-build-isolation --editable '.[data,report,test]'
	touch $@

demo: setup  ## SFT, IA2 and IA2→SFT on the embedded model, in about a minute
	$(BIN)/ia2mini run

test: setup lint  ## every check, offline
	$(BIN)/python -m pytest

test-real: setup  ## on a real checkpoint of 135 million weights, in $$IA2MINI_REAL or made (a minute, 270 MB); minutes
	real="$${IA2MINI_REAL:-$$($(BIN)/python tests/real.py)}" && IA2MINI_REAL="$$real" $(BIN)/python -m pytest tests/test_real.py

lint: setup
	$(BIN)/ruff format --check --quiet --line-length 120 .
	$(BIN)/ruff check --line-length 120 --select E,F,W,I,B,UP --ignore B905 .

bench: setup  ## how fast, and against whom
	$(BIN)/python -m bench

bench-gpu:  ## the first hour on a GPU, by the python that is there: its tests, then every bench; type it again to go on
	$(PYTHON) -m bench gpu

clean:
	rm -rf $(VENV) build *.egg-info
