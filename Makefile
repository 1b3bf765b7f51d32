# make demo      ask the shipped model about its images (needs only Python >= 3.11 and a package index)
# make serve     OpenAI's API and a chat page on http://127.0.0.1:8000 (SERVE_ARGS="--port 9000 MODEL" and the like)
# make test      fast tests          make test-all   all of them
# make test-thorough   more cases of what make test covers, and parity compiled as for users; .ci/run runs both
# make test-changed   the tests of what you changed (CHANGED_ARGS="--since REVISION"), after make check
# make kernels   every kernel in every case, and compiled for an H100 (needs Python 3.12, and ptxas for the second)
# make clients   the service with clients of other people, each in an environment of its own (npm for JavaScript's)
# make check     format, lint, types
# make docs      the documentation site in build/site, with warnings as errors
# make bench     decode speed on this machine (BENCH_ARGS="--torch-python ..." compares with PyTorch)
# make clean     remove what these made, the environment included
#
# All of them set up $(VENV) first; VENV=... and PYTHON=... choose another place or interpreter.

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?=
PYTEST_ARGS ?=
# Whole files go to one of a few processes: their fixtures (models, compiled programs) are made once.
PARALLEL := -n auto --maxprocesses 4 --dist loadfile
KERNELS_VENV ?= .venv-kernels
BENCH_ARGS ?=
CHANGED_ARGS ?=
SERVE_ARGS ?=
CLIENTS_VENV ?= .venv-clients
CLIENTS := $(basename $(notdir $(wildcard tests/clients/requirements/*.txt))) openai-js

BIN := $(VENV)/bin
PINS := pyproject.toml constraints.txt
# A user's settings for --user or --target would put the packages elsewhere.
PIP := env -u PIP_USER -u PIP_TARGET -u PIP_PREFIX
PIP_OPTIONS := --quiet --disable-pip-version-check
PIP_INSTALL = $(PIP) $(BIN)/python -m pip install $(PIP_OPTIONS) --constraint constraints.txt

.PHONY: help demo serve test test-thorough test-all test-changed kernels kernels-here clients check docs bench clean

help:
	@sed -n "/^#$$/q; s/^# //p" Makefile

demo: $(VENV)/.installed
	@$(BIN)/python tools/demo.py

serve: $(VENV)/.installed-serve
	@exec $(BIN)/step3 serve $(SERVE_ARGS)

test: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not kernels and not thorough" $(PYTEST_ARGS)

# Without the flags that make tests compile faster (tests/conftest.py): compiled as for users.
test-thorough: $(VENV)/.installed-dev
	@XLA_FLAGS= $(BIN)/python -m pytest $(PARALLEL) -m "(thorough or parity) and not slow and not kernels" $(PYTEST_ARGS)

test-all: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest $(PARALLEL) -m "not kernels" $(PYTEST_ARGS)

test-changed: check
	@$(BIN)/python -m tools.changed_tests $(CHANGED_ARGS) $(PYTEST_ARGS)

# An environment of its own: the newest JAX, whose interpreter is the fastest, and the compiler for GPUs.
kernels:
	@$(MAKE) --no-print-directory VENV="$(KERNELS_VENV)" PYTHON="$(or $(PYTHON),python3.12)" kernels-here

# A test in which warpgroups wait for each other for ever ends with the stacks of all threads.
kernels-here: $(VENV)/.installed-aot
	@$(BIN)/python -m pytest $(PARALLEL) -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true tests/kernels $(PYTEST_ARGS)

clients: $(VENV)/.installed-dev $(CLIENTS:%=$(CLIENTS_VENV)/%/.installed)
	@STEP3_TEST_CLIENTS="$(abspath $(CLIENTS_VENV))" $(BIN)/python -m pytest tests/clients $(PYTEST_ARGS)

check: $(VENV)/.installed-dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# NO_MKDOCS_2_WARNING: the theme advertises its successor on every build.
docs: $(VENV)/.installed-docs
	@NO_MKDOCS_2_WARNING=1 JAX_PLATFORMS=cpu $(BIN)/python -m mkdocs build --strict
	@echo "The site is in build/site: open build/site/index.html"

bench: $(VENV)/.installed
	@$(BIN)/step3 bench decode $(BENCH_ARGS)

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
	@# An environment that was there before is kept.
	rm -rf "$(CLIENTS_VENV)"
	for made in "$(VENV)" "$(KERNELS_VENV)"; do if [ -e "$$made/.made" ]; then rm -rf "$$made"; fi; done

# The stamps: an install runs again only when a pin changed. Without extras jax is the CPU build.
$(VENV)/.installed: $(PINS) | $(VENV)/.python
	@echo "Installing step3-jax into $(VENV) (the first time takes a minute or two) ..."
	@$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-serve: $(PINS) | $(VENV)/.python
	@echo "Installing step3-jax and what its service needs into $(VENV) (the first time takes a minute or two) ..."
	@$(PIP_INSTALL) --editable '.[server,grammar]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(PINS) | $(VENV)/.python
	@echo "Installing step3-jax and the tools of its developers into $(VENV) ..."
	@$(PIP_INSTALL) --editable '.[dev]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-serve

$(VENV)/.installed-docs: $(PINS) | $(VENV)/.python
	@echo "Installing step3-jax and what its documentation site needs into $(VENV) ..."
	@$(PIP_INSTALL) --editable '.[docs]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-aot: $(VENV)/.installed-dev
	@$(PIP_INSTALL) --editable '.[aot]'
	@touch $@

$(CLIENTS_VENV)/openai-js/.installed: tests/clients/programs/package.json tests/clients/programs/openai_js.mjs
	@mkdir -p $(@D)
	@cp $^ $(@D)
	@cd $(@D) && npm install --silent --no-audit --no-fund
	@touch $@

# The client's own pin and whatever goes with it, apart from ours.
$(CLIENTS_VENV)/%/.installed: tests/clients/requirements/%.txt | $(VENV)/.python
	@echo "Installing $$(cat $<) into $(@D) ..."
	@$(BIN)/python -m venv --clear $(@D)
	@$(PIP) $(@D)/bin/python -m pip install $(PIP_OPTIONS) --requirement $<
	@touch $@

# An environment that is there and works is kept, whoever made it; a half-made one is made anew.
$(VENV)/.python:
	@if [ -x "$(BIN)/python" ] && "$(BIN)/python" -m pip --version >/dev/null 2>&1; then \
	  if ! "$(BIN)/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	    echo "make: $(VENV) has $$("$(BIN)/python" -V 2>&1), Python 3.11 or later is needed:" \
	      "remove $(VENV), or name another with VENV=..." >&2; exit 1; \
	  fi; touch $@; exit 0; \
	fi; \
	candidates="$(PYTHON)"; usable=; \
	for python in $${candidates:-python3.12 python3.11 python3.13 python3 python}; do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
	  usable="$$python"; \
	  "$$python" -c 'import venv, ensurepip' >/dev/null 2>&1 || continue; \
	  echo "Making $(VENV) with $$("$$python" -V) ..."; \
	  "$$python" -m venv --clear "$(VENV)" && touch "$(VENV)/.made" $@ && exit 0 || exit 1; \
	done; \
	if [ -n "$$usable" ]; then \
	  echo "make: $$usable has no venv module: install it (Debian and Ubuntu call it python3-venv)," \
	    "or name another interpreter with PYTHON=..." >&2; \
	else \
	  echo "make: no Python 3.11 or later found (looked for $${candidates:-python3.12, python3.11, python3.13, python3, python}):" \
	    "install one, or name it with PYTHON=/path/to/python3" >&2; \
	fi; exit 1
