# `make demo` and `make test` work from a bare clone: they set up their own virtual environment.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
SOURCES := pyproject.toml setup.py $(wildcard csrc/*)

.PHONY: demo test bench figures lint clean
demo: $(READY)
	$(RUN) -m bench.demo

test: $(READY)
	$(RUN) -m pytest

bench: $(READY)
	$(RUN) -m bench run

figures: $(READY)
	$(RUN) -m bench.kernels --write
	$(RUN) -m bench.instructions --write

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Rebuilt when the C++ sources, the build or the choice of torch change.
$(READY): $(SOURCES) $(VENV)/torch-$(TORCH)
	$(RUN) -m pip install --quiet --editable '.[bench,lint,test]'
	touch $@

$(VENV)/torch-$(TORCH):
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet '$(TORCH)'
	rm -f $(VENV)/torch-*
	touch '$@'

clean:
	rm -rf $(VENV) build *.egg-info fastopt/*.so
