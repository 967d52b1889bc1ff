# `make demo` and `make test` work from a bare clone: they set up their own virtual environment.
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test test-frameworks sanitize bench figures lint clean extension
demo: extension
	$(RUN) -m bench.demo

test: extension
	$(RUN) -m pytest

# Only here are the frameworks installed: without them, `make test` skips what needs them.
test-frameworks: extension
	DS_BUILD_OPS=0 $(RUN) -m pip install --quiet --no-build-isolation 'fastopt[frameworks]'
	$(RUN) -c "import accelerate, deepspeed, lightning, peft, torchtitan, transformers"  # none skips
	$(RUN) -m pytest -m frameworks

# What C++ does, with the extension built for AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZER := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g
RUNTIME = $(foreach lib,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(lib).so))
SANITIZED := norm packing precision/test_precision.py rules/test_bits.py \
	$(addprefix step/test_,guard_pages.py lifecycle.py odd_uses.py torch_abi.py)
sanitize: $(READY)
	CXXFLAGS="$(SANITIZER)" LDFLAGS="$(SANITIZER)" $(RUN) setup.py --quiet build \
		--build-base build/sanitized --build-lib build/sanitized/lib
	LD_PRELOAD="$(RUNTIME)" ASAN_OPTIONS=detect_leaks=0 $(RUN) -m pytest \
		-o pythonpath=build/sanitized/lib $(SANITIZED:%=tests/%)

bench: extension
	$(RUN) -m bench run

figures: extension
	$(RUN) -m bench.kernels --write
	$(RUN) -m bench.instructions --write

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# ninja knows what is to be built: nothing, where no source and no flag has changed.
extension: $(READY)
	$(RUN) setup.py --quiet build_ext --inplace

$(READY): pyproject.toml $(VENV)/torch-$(TORCH)
	$(RUN) -m pip install --quiet 'setuptools>=77' 'pybind11>=2.13' 'ninja>=1.11'
	$(RUN) -m pip install --quiet --no-build-isolation --editable '.[bench,lint,test]'
	touch $@

$(VENV)/torch-$(TORCH):
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet '$(TORCH)'
	rm -f $(VENV)/torch-*
	touch '$@'

clean:
	rm -rf $(VENV) build *.egg-info fastopt/*.so
