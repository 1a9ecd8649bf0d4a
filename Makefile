# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
SOURCES = ia2mini models bench tests examples docs README.md CONTRIBUTING.md
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup demo test test-real fuzz kills lint mutants bench bench-gpu clean

setup: $(VENV)/ready  ## a virtual environment with ia2mini, all extras and the tested versions

$(VENV)/ready: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools wheel
	$(INSTALL) torch
	$(INSTALL) --no-build-isolation --editable '.[data,report,test]'
	touch $@
	@echo 'To use the command `ia2mini`: source $(BIN)/activate'

demo: setup  ## SFT, IA2 and IA2→SFT on the embedded model, in one to three minutes
	$(BIN)/ia2mini run
	@echo 'To use the command yourself: source $(BIN)/activate'

test: setup lint  ## every check, offline
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-real: setup  ## on a real checkpoint of 135 million weights, in $$IA2MINI_REAL or made (a minute, 270 MB), and in $$IA2MINI_REAL2; minutes
	real="$${IA2MINI_REAL:-$$($(BIN)/python tests/real.py)}" && IA2MINI_REAL="$$real" $(BIN)/python -m pytest tests/test_real.py

fuzz: setup  ## the tests of hostile files with as many more mutations as fit into $$IA2MINI_FUZZ seconds (an hour)
	IA2MINI_FUZZ=$${IA2MINI_FUZZ:-3600} $(BIN)/python -m pytest tests/test_fuzz.py

kills: setup  ## each command killed $$IA2MINI_KILLS times (30), on full disks and without permissions; a quarter of an hour
	IA2MINI_KILLS="$${IA2MINI_KILLS:-30}" $(BIN)/python -m pytest -s tests/test_kills.py

lint: setup
	$(BIN)/ruff format --check --quiet --line-length 100 $(SOURCES)
	$(BIN)/ruff check --line-length 120 --select E,F,W,I,B,UP --ignore B905 $(SOURCES)
	rm -rf build/types && mkdir -p build/types/ia2mini
	ln -s $(CURDIR)/ia2mini/* build/types/ia2mini && ln -sfn $(CURDIR)/models build/types/ia2mini/models
	$(BIN)/mypy

mutants: setup  ## break chosen lines one at a time: the tests must notice; minutes
	$(BIN)/python tests/mutants.py

bench: setup  ## how fast, and against whom
	$(BIN)/python -m bench

bench-gpu:  ## the first hour on a GPU, by the python that is there: its tests, then every bench; type it again to go on
	$(PYTHON) -m bench gpu

clean:
	rm -rf $(VENV) build *.egg-info
