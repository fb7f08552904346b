# make quickstart   the main job on this machine, in about a minute after the install
# make test         lint, types and tests
# make clean        forget the virtual environment, shards and runs that these made

PYTHON ?= python3
# Tests that run beside one another; many start two or four processes of their own.
JOBS ?= 2
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.installed
	$(BIN)/python data/make_digits.py --out shards/digits
	$(BIN)/softmoe train recipe=quickstart

test: $(VENV)/.installed lint
	$(BIN)/python -m pytest --numprocesses=$(JOBS) --dist=loadfile --durations=40

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# One install serves both targets. The bound on torch keeps pip from a release that we have not tried.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[quickstart,test]"
	touch $@

clean:
	rm -rf $(VENV) shards runs
