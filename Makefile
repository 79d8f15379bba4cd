# natgrad's front door. `make` alone lists what there is.
#
# On a fresh machine `make demo` and `make test` build .venv first; run again, they start at once.
# ARGS is handed on: make test ARGS="-k kfac -x"; make demo ARGS="--help".

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOG := $(VENV)/install.log
PEERS := tests/peers/requirements.txt

# constraints.txt is the one place that pins torch. It is named to pip explicitly as well, so that a wheel of
# exactly that release on this machine is taken before anything newer.
TORCH := $(shell sed -n 's/^\(torch==[^ ;#]*\).*/\1/p' constraints.txt)

# The first of these that is Python 3.10 or newer and can build a virtual environment; PYTHON=… overrides.
CANDIDATES := $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11 python3.10 python)

CHECKED := src tests $(wildcard examples benchmarks)

.PHONY: help demo test test-slow check install clean

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS='|' read -r name text; do \
	    printf '%-18s %s\n' "$$name" "$$text"; done

demo: $(STAMP) ## race natgrad against Adam and SGD on real digits (about two minutes), then write the report
	@$(BIN)/natgrad demo $(ARGS)

test: $(STAMP) ## run the tests, all but the slow ones; on each core a process (ARGS="-n 0": in one)
	@$(BIN)/python -m pytest -q -n logical -m "not slow" $(ARGS)

test-slow: $(STAMP) ## run the slow tests
	@$(BIN)/python -m pytest -q -n logical -m slow $(ARGS)

check: $(STAMP) ## format, lint and type-check (run it before each commit)
	@$(BIN)/ruff format $(CHECKED)
	@$(BIN)/ruff check --fix $(CHECKED)
	@$(BIN)/mypy

install: $(STAMP) ## build or update .venv; the commands above do so by themselves

clean: ## remove .venv and what the tools left behind
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# What pip says goes to the log (its warnings about this machine's mirrors would drown an error); a failure shows
# its end.
$(STAMP): pyproject.toml constraints.txt $(PEERS)
	@python=""; \
	for candidate in $(CANDIDATES); do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then \
	        python="$$candidate"; \
	        "$$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1 && break; \
	    fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "natgrad needs Python 3.10 or newer; none is among: $(CANDIDATES). Name one: make PYTHON=/path/to/python3 …" >&2; exit 1; \
	elif ! "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	    echo "$$python can't build a virtual environment: its module venv is missing." >&2; \
	    echo "On Debian or Ubuntu: sudo apt-get install python3-venv. Or name another: make PYTHON=/path/to/python3 …" >&2; \
	    exit 1; \
	fi; \
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    echo "Building $(VENV) with $$("$$python" --version) …"; \
	    "$$python" -m venv --clear $(VENV); \
	fi; \
	echo "Installing natgrad and its tools into $(VENV) (a few minutes the first time; log: $(LOG)) …"; \
	if ! $(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off \
	        -c constraints.txt '$(TORCH)' -e '.[lab,peers,test,tools,dev]' >$(LOG) 2>&1 \
	    || ! $(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off \
	        --no-deps -r $(PEERS) >>$(LOG) 2>&1; then \
	    grep -v '^WARNING: Location' $(LOG) | tail -n 20 >&2 || true; \
	    echo "The installation failed; all of it is in $(LOG)." >&2; exit 1; \
	fi; \
	touch $@
