# Everything runs in a virtual environment of the project's own, made on the first call.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo bench test search check format build clean

demo: $(VENV)/installed
	$(BIN)/probecache demo

bench: $(VENV)/installed
	$(BIN)/python -m bench extract

# A file of tests at a time in each process: what a file builds, it builds once.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

# The tests that draw examples, with others than `test` draws.
search: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 -m hypothesis --hypothesis-profile default

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(VENV)/installed-dev
	$(BIN)/pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) dist build

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# PyTorch first: alone it is what constraints.txt names, so that no CUDA build is pulled in.
$(VENV)/torch: constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	@touch $@

$(VENV)/installed: pyproject.toml $(VENV)/torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/installed-dev: pyproject.toml $(VENV)/torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@ $(VENV)/installed
