# `make demo` and `make test` on a fresh machine: Python 3.11 or newer with venv, git, make, and g++ for the native
# kernels (without it they are off). PIP_ARGS passes extra options to pip, for example a CPU-only index; ARGS goes to
# `make recipes`, for example ARGS="--only rl-tiny --seeds 0,1,2".
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP_ARGS ?=
ARGS ?=
STAMP := $(VENV)/.installed
NATIVE := $(wildcard CMakeLists.txt native/*)

.PHONY: demo recipes test lint clean

demo: $(STAMP)
	$(VENV)/bin/sateen demo

recipes: $(STAMP)
	$(PY) benchmarks/recipes.py $(ARGS)

test: $(STAMP)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" sh tools/check.sh

lint: $(STAMP)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" sh tools/check.sh lint

# torch first, on its own: resolved together with the rest, a plain range may bring gigabytes of CUDA packages.
$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q $(PIP_ARGS) -c constraints.txt torch numpy
	$(PY) -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[test]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build
