# make help     lists the targets
# make test     in a virtual environment of its own, made on the first run
# make test PYTHON=/path/to/python VENV=
#               in that Python as it is, installing nothing (no network needed)

PYTHON ?= python3
VENV   ?= .venv
# Installed only where no torch >= 2.10 can be imported.
TORCH  ?= torch==2.13.0
# Two processes where pytest-xdist is there (tests pin their own threads).
XDIST  = $$($(PY) -c "import xdist; print('-n 2 --dist worksteal')" 2>/dev/null)
# More arguments for pytest, the demo or the benchmark, as in: make test ARGS="-k forward -x"
ARGS   ?=

# With the folders, whose time changes when a file goes.
SOURCES := $(shell find csrc 2>/dev/null) setup.py ghost_ops/_env.py
HAS_TORCH := import re, torch; v = re.findall(r'\d+', torch.__version__); \
	raise SystemExit(tuple(map(int, v[:2])) < (2, 10))

ifeq ($(strip $(VENV)),)
# ---- an existing Python, untouched: libraries are built in place
PY     := PYTHONPATH=$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON)
BIN    := $(dir $(PYTHON))
STAMPS := build/stamps/$(shell $(PYTHON) -c "import sys; print(sys.implementation.cache_tag)")
extra   =

$(STAMPS)/library: $(SOURCES)
	@mkdir -p $(STAMPS)
	$(PY) setup.py -q build_ext --inplace
	@touch $@
else
# ---- an environment of our own, with the package in develop mode
PY     := $(VENV)/bin/python
BIN    := $(VENV)/bin
STAMPS := $(VENV)/stamps
extra   = $(STAMPS)/extra-$(1)
# Links the checkout into the environment. The libraries are the step after it, where ninja is seen.
DEVELOP = GHOST_OPS_BUILD_CPU=0 GHOST_OPS_BUILD_CUDA=0 \
	$(PY) -m pip install -q --no-build-isolation -e

# With the packages of the outer Python visible if they include torch, so that gigabytes are not
# downloaded twice.
$(STAMPS)/venv:
	@if $(PYTHON) -c "$(HAS_TORCH)" 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	@$(PY) -c "$(HAS_TORCH)" 2>/dev/null || $(PY) -m pip install -q "$(TORCH)"
	@touch $@

$(STAMPS)/package: $(STAMPS)/torch pyproject.toml
	$(PY) -m pip install -q "setuptools>=77" "ninja>=1.11" "pybind11>=2.13"
	$(DEVELOP) .
	@touch $@

$(STAMPS)/library: $(STAMPS)/package $(SOURCES)
	$(PY) setup.py -q build_ext --inplace
	@touch $@

$(STAMPS)/extra-%: $(STAMPS)/package
	$(DEVELOP) ".[$*]"
	@touch $@
endif

CXX_FILES := find csrc tests -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' -o -name '*.inc'

.DEFAULT_GOAL := help
.PHONY: help build demo test test-all bench bench-quick gpu-kit lint format clean distclean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

build: $(STAMPS)/library  ## build the native libraries (incremental) and show what runs
	$(PY) -m ghost_ops

demo: $(STAMPS)/library $(call extra,demo)  ## train on real digits with and without fusion, compare every shape
	$(PY) -m benchmarks.demo $(ARGS)

test: $(STAMPS)/library $(call extra,test)  ## run the tests, without the slow ones
	$(PY) -m pytest $(XDIST) -m "not slow" $(ARGS)

test-all: $(STAMPS)/library $(call extra,test)  ## run all tests
	$(PY) -m pytest $(XDIST) $(ARGS)

bench: $(STAMPS)/library $(call extra,bench) $(call extra,demo)  ## measure everything on this machine, write results/REPORT.md
	$(PY) -m benchmarks all $(BENCH_ARGS) $(ARGS)

bench-quick: BENCH_ARGS = --quick
bench-quick: bench  ## the same with less of everything, in three minutes

gpu-kit: $(STAMPS)/library  ## prepare what benchmarks/gpu.py needs on a GPU machine, in build/gpu-kit
	$(PY) benchmarks/gpu.py --kit $(ARGS)

lint: $(call extra,lint)  ## check style: ruff and clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CXX_FILES) | PATH="$(BIN):$$PATH" xargs clang-format --dry-run -Werror

format: $(call extra,lint)  ## apply the style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CXX_FILES) | PATH="$(BIN):$$PATH" xargs clang-format -i

clean:  ## remove what a build makes
	rm -rf build dist *.egg-info ghost_ops/*.so
	rm -f $(STAMPS)/library
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## remove the virtual environment too
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
