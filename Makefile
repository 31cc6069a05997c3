VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test style quality install docs notebooks

# Installs only when something that decides the environment has changed.
$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

install: $(BIN)/.installed

demo: install
	$(BIN)/flashmask demo

test: install
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not timing"
	$(BIN)/python -m pytest -m timing

docs: install
	$(BIN)/mkdocs build --strict

notebooks: install
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[notebooks]"
	$(BIN)/jupyter execute --inplace notebooks/*.ipynb

style: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quality: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
