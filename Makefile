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
SOURCES := $(shell find csrc 2>/dev/null) setup.py build_backend.py ghost_ops/environment.py
HAS_TORCH := import re, torch; v = re.findall(r'\d+', torch.__version__); \
	raise SystemExit(tuple(map(int, v[:2])) < (2, 10))

ifeq ($(strip $(VENV)),)
# ---- an existing Python, untouched: libraries are built in place
PY     := PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)
BIN    := $(dir $(PYTHON))
STAMPS := build/stamps/$(shell $(PYTHON) -c "import sys; print(sys.implementation.cache_tag)")
extra   =

.PHONY: environment
environment:
	@mkdir -p $(STAMPS)
else
# ---- an environment of our own, with the package in develop mode
PY     := $(VENV)/bin/python
BIN    := $(VENV)/bin
STAMPS := $(VENV)/stamps
extra   = $(STAMPS)/extra-$(1)
# Links the checkout into the environment. The libraries are the step after it, where ninja is seen.
DEVELOP = GHOST_OPS_BUILD_CPU=0 GHOST_OPS_BUILD_CUDA=0 $(PIP) --no-build-isolation -e
# Errors alone: warnings about the machine's package settings are not this project's.
PIP     = $(PY) -m pip install -qq --disable-pip-version-check

# With the packages of the outer Python visible if they include torch, so that gigabytes are not
# downloaded twice.
$(STAMPS)/venv:
	@echo "ghost_ops: making $(VENV), once"
	@if $(PYTHON) -c "$(HAS_TORCH)" 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages $(VENV); else $(PYTHON) -m venv $(VENV); fi
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv
	@$(PY) -c "$(HAS_TORCH)" 2>/dev/null || { \
		echo "ghost_ops: installing $(TORCH): 200 MB and about a minute; gigabytes for a GPU"; \
		$(PIP) "$(TORCH)"; }
	@touch $@

$(STAMPS)/package: $(STAMPS)/torch pyproject.toml
	@$(PIP) "setuptools>=77" "ninja>=1.11" "pybind11>=2.13"
	@$(DEVELOP) .
	@touch $@

$(STAMPS)/extra-%: $(STAMPS)/package
	@echo "ghost_ops: installing what '$*' needs, about half a minute"
	@$(DEVELOP) ".[$*]"
	@touch $@

environment: $(STAMPS)/package
endif

$(STAMPS)/library: $(SOURCES) | environment
	@$(PY) setup.py -q build_ext --inplace
	@touch $@

# For the demo: without the CUDA library (four minutes) where no GPU would run it.
$(STAMPS)/demo-library: $(SOURCES) | environment
	@export GHOST_OPS_BUILD_CUDA=$${GHOST_OPS_BUILD_CUDA:-$$($(PY) -W ignore -c \
		"import torch; print('auto' if torch.cuda.is_available() else '0')")}; \
		$(PY) setup.py -q build_ext --inplace
	@touch $@

# ---- wheels, as .github/workflows/wheels.yml builds, tests and publishes them

# CUDA=1 adds the kernels for GPUs. A wheel without them has the local version +cpu.
CUDA        ?= 0
WHEEL_ARCHS ?= 8.0 8.6 9.0 10.0+PTX
WHEEL_BUILD  = build/wheel/$(if $(filter 1,$(CUDA)),cuda,cpu)
# All files get the time of the last commit; in an sdist that of setup.py.
SOURCE_DATE_EPOCH ?= $(or $(shell git log -1 --format=%ct -- . 2>/dev/null),$(shell stat -c %Y setup.py))

wheel: $(call extra,wheel)  ## build a manylinux wheel for this Python in dist/ (CUDA=1: with the kernels for GPUs)
	@rm -rf $(WHEEL_BUILD) && mkdir -p $(WHEEL_BUILD) dist
	@export SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) GHOST_OPS_BUILD_CPU=1 \
		GHOST_OPS_BUILD_CUDA=$(CUDA) GHOST_OPS_CUDA_ARCHS="$(WHEEL_ARCHS)" PATH="$(BIN):$$PATH"; \
	set -e; umask 022; \
	$(PY) -W ignore setup.py -q egg_info --egg-base $(WHEEL_BUILD) $(if $(filter 1,$(CUDA)),,--tag-build=+cpu) \
		build --build-base $(WHEEL_BUILD) \
		bdist_wheel --bdist-dir $(WHEEL_BUILD)/bdist --dist-dir $(WHEEL_BUILD); \
	$(PY) -m auditwheel show $(WHEEL_BUILD)/*.whl; \
	$(PY) -m auditwheel repair --exclude "libtorch*.so" --wheel-dir $(WHEEL_BUILD)/repaired \
		$(WHEEL_BUILD)/*.whl; \
	mv $(WHEEL_BUILD)/repaired/*.whl dist; \
	cd dist; ls -t *.whl | head -n 1 | xargs -d "\n" sh -c 'du -h "$$0"; sha256sum "$$0"'

# Gigabytes are downloaded for a torch with CUDA.
WHEEL_TORCH ?= 2.10.0 2.11.0 2.12.0 2.13.0

wheel-test:  ## try the newest wheel in dist/ with each torch of WHEEL_TORCH, in environments of their own
	@$(PYTHON) tests/wheel_matrix.py $(WHEEL_TORCH) $(ARGS)

CXX_FILES := find csrc tests -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' -o -name '*.inc'

.DEFAULT_GOAL := help
.PHONY: help build demo test test-isa test-all bench bench-quick gpu-kit wheel wheel-test lint format docs clean distclean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

build: $(STAMPS)/library  ## build the native libraries (incremental) and show what runs
	$(PY) -m ghost_ops

# Packages are downloaded while the library is compiled.
TOGETHER = @$(MAKE) -s --no-print-directory -j 2

demo: environment  ## train on real digits with and without fusion, compare every shape
	$(TOGETHER) $(STAMPS)/demo-library $(call extra,demo)
	$(PY) -m examples.demo $(ARGS)

test: environment  ## run the tests, without the slow ones
	$(TOGETHER) $(STAMPS)/library $(call extra,test)
	$(PY) -m pytest $(XDIST) -m "not slow" $(ARGS)

# What computes numbers. Under each instruction set that the processor has, PyTorch's kernels and
# oneDNN's are held to it too: then a wide processor shows what a narrow one computes.
NUMERICAL ?= $(addprefix tests/test_,forward.py training.py backward.py norm_options.py \
	properties.py special_values.py ops.py gate.py prelu.py network_ops.py bottleneck.py \
	children.py models.py determinism.py)
ISA ?= $$($(PY) -c "import ghost_ops._C as c; print(*c.available_isas(), 'no-mkldnn')")

test-isa: $(STAMPS)/library $(call extra,test)  ## run the numerical tests under each instruction set (ISA="avx2 ...")
	@for isa in $(ISA); do \
		case $$isa in \
			avx512) settings="DNNL_MAX_CPU_ISA=AVX512_CORE ATEN_CPU_CAPABILITY=avx512";; \
			avx512_amx) settings="DNNL_MAX_CPU_ISA=AVX512_CORE_AMX ATEN_CPU_CAPABILITY=avx512";; \
			avx2) settings="DNNL_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2";; \
			generic) settings="DNNL_MAX_CPU_ISA=SSE41 ATEN_CPU_CAPABILITY=default";; \
			no-mkldnn) settings="";; \
			*) echo "ISA: $$isa is none of avx512_amx, avx512, avx2, generic, no-mkldnn" >&2; exit 2;; \
		esac; \
		case $$isa in no-mkldnn) more=--no-mkldnn;; \
			*) more=; settings="$$settings GHOST_OPS_CPU_ISA=$$isa";; esac; \
		echo "== $$isa: $$settings $$more"; \
		env $$settings $(PY) -m pytest -q $(XDIST) -m "not slow" $$more $(NUMERICAL) $(ARGS) || exit 1; \
	done

test-all: $(STAMPS)/library $(call extra,test)  ## run all tests
	$(PY) -m pytest $(XDIST) $(ARGS)

bench: $(STAMPS)/library $(call extra,bench)  ## measure everything on this machine, write results/REPORT.md
	$(PY) -m benchmarks all $(BENCH_ARGS) $(ARGS)

bench-quick: BENCH_ARGS = --quick
bench-quick: bench  ## the same with less of everything, in three minutes

gpu-kit: $(STAMPS)/library  ## prepare what benchmarks/gpu.py needs on a GPU machine, in build/gpu-kit
	$(PY) benchmarks/gpu.py --kit $(ARGS)

# VENV= installs nothing, so tools can be missing: an error, or a message with MISSING_TOOLS=skip.
MISSING_TOOLS ?= fail

lint: $(call extra,lint)  ## check style and types: ruff, clang-format and mypy
	@export PATH="$(BIN):$$PATH"; missing=; \
	for tool in ruff mypy; do $(PY) -c "import $$tool" 2>/dev/null || missing="$$missing $$tool"; done; \
	command -v clang-format >/dev/null || missing="$$missing clang-format"; \
	if [ -n "$$missing" ]; then \
		echo "ghost_ops: make lint did not run, this Python lacks:$$missing (extra 'lint' of pyproject.toml)" >&2; \
		[ "$(MISSING_TOOLS)" = skip ]; exit; \
	fi; \
	set -e; \
	$(PY) -m ruff check .; \
	$(PY) -m ruff format --check .; \
	$(CXX_FILES) | xargs clang-format --dry-run -Werror; \
	$(PY) -m mypy

format: $(call extra,lint)  ## apply the style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CXX_FILES) | PATH="$(BIN):$$PATH" xargs clang-format -i

# The modules that ghost_ops.__all__ names, without the files of packages.
PUBLIC = ghost_ops '!ghost_ops\.(backends|planner)\..*'

docs: $(call extra,docs)  ## write the API reference from the docstrings to build/docs
	$(PY) -m pdoc --docformat google --no-show-source --template-directory docs/pdoc \
		--output-directory build/docs $(PUBLIC)
	@echo "ghost_ops: open build/docs/index.html"

clean:  ## remove what a build makes
	rm -rf build dist *.egg-info ghost_ops/*.so ghost_ops/build_record.json
	rm -f $(STAMPS)/*library
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## remove the virtual environment too
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache .hypothesis
