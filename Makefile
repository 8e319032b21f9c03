# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
IMAGES ?=

.PHONY: demo test lint clean

demo: $(VENV)/demo.stamp
	$(BIN)/python cli.py demo $(if $(IMAGES),--images "$(IMAGES)")

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The environment is made from constraints.txt and nothing else; a change of what it is made from makes it anew.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# torch comes first and by its exact version: asked for by a range, an index may answer with another build of it.
$(VENV)/torch.stamp: constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	touch $@

$(VENV)/demo.stamp: setup.cfg pyproject.toml $(VENV)/torch.stamp
	$(BIN)/python -m pip install --quiet -e ".[demo]" -c constraints.txt
	touch $@

$(VENV)/dev.stamp: setup.cfg pyproject.toml $(VENV)/torch.stamp
	$(BIN)/python -m pip install --quiet -e ".[dev]" -c constraints.txt
	touch $@ $(VENV)/demo.stamp

clean:
	rm -rf $(VENV) *.egg-info build
