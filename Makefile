# make quickstart   the main job on this machine, in about a minute after the install
# make test         lint, types and tests
# make constraints  pins anew what an image installs (docker/constraints.txt, docker/build.txt)
# make clean        forget the virtual environment, shards and runs that these made

PYTHON ?= python3
# Tests that run beside one another; many start two or four processes of their own.
JOBS ?= 2
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: quickstart test lint constraints clean

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

# For every Python that we support, without torch and what comes with it: those are the base's.
TORCHS = ^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+|sympy|mpmath|networkx|filelock|setuptools)==
UV = $(VENV)/uv/bin/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --upgrade

constraints: pyproject.toml
	$(PYTHON) -m venv $(VENV)/uv
	$(VENV)/uv/bin/python -m pip install --quiet uv
	$(UV) --extra quickstart --extra sweep --extra pictures --extra parquet pyproject.toml | grep -vE '$(TORCHS)' >$(VENV)/pins
	(echo "# What an image installs beside its base's torch; \`make constraints\` writes it."; cat $(VENV)/pins) >docker/constraints.txt
	printf '%s\n' hatchling setuptools | $(UV) - >$(VENV)/pins
	(echo "# What builds the wheels of an image; \`make constraints\` writes it."; cat $(VENV)/pins) >docker/build.txt

clean:
	rm -rf $(VENV) shards runs
