# Every target sets up first what it needs. `make help` lists them.
# PYTHON=...     another interpreter, with an environment of its own beside .venv: make test PYTHON=python3.13
# VENV=...       where the environment lives (default: .venv, or .venv-NAME for PYTHON=NAME)
# BPKIT_LAB_ARGS arguments for JupyterLab, as "--no-browser"
# BPKIT_NO_BROWSER=1  leaves the browser tests out, knowingly

VENV ?= .venv$(addprefix -,$(notdir $(PYTHON)))
export PYTHON
PY := $(VENV)/bin/python
MAKEFLAGS += --no-print-directory
BPKIT_LAB_ARGS ?=
NOTEBOOKS ?=
BENCHMARKS ?=
T ?=

COURSE := $(VENV)/.bpkit-course
DEV := $(VENV)/.bpkit-dev
BENCH := $(VENV)/.bpkit-bench

.PHONY: help setup lab test book execute bench lighthouse lint format freeze clean
.DEFAULT_GOAL := help

help:
	@echo "make setup    the environment, in $(VENV)"
	@echo "make lab      JupyterLab on the course"
	@echo "make test     everything that CI checks (T=\"unit book\" for some of: lint unit slow chapters book browser)"
	@echo "make book     the book, into build/book (open build/book/index.html)"
	@echo "make execute  run the chapters anew and save their outputs (NOTEBOOKS=chapters/x.ipynb for one)"
	@echo "make bench    the benchmarks against peers, results in build/bench"
	@echo "make lighthouse  the built pages as a telephone gets them (needs npm)"
	@echo "make lint     ruff and mypy (make format mends what ruff can)"
	@echo "make clean    remove what was built (the environment stays)"

$(COURSE): pyproject.toml constraints.txt
	@tools/setup.sh $(VENV) course $@

$(DEV): pyproject.toml constraints.txt
	@tools/setup.sh $(VENV) course,book,test $@ && touch $(COURSE)

$(BENCH): pyproject.toml constraints.txt | $(DEV)
	@tools/setup.sh $(VENV) bench $@

setup: $(DEV)
	@:

lab: $(COURSE)
	@$(PY) tools/lab.py $(BPKIT_LAB_ARGS)

test: $(DEV)
	@$(PY) tools/test.py $(T)

book: $(DEV)
	@$(PY) tools/book.py

execute: $(DEV)
	@$(PY) tools/execute.py $(NOTEBOOKS)

bench: $(BENCH)
	@$(PY) tools/bench.py $(BENCHMARKS)

lighthouse: $(DEV)
	@$(PY) tools/lighthouse.py

lint: $(DEV)
	@$(PY) tools/test.py lint

format: $(DEV)
	@$(VENV)/bin/ruff check --fix .

freeze: $(DEV) $(BENCH)
	@{ sed -n '/^#/p' constraints.txt; { grep -E '^(appnope|setuptools)==' constraints.txt; \
	   $(PY) -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//'; } | sort -fu; } > build/constraints.txt
	@mv build/constraints.txt constraints.txt

clean:
	@rm -rf build .mypy_cache .ruff_cache .pytest_cache
	@find bpkit chapters tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
