# `make demo` and `make test` need Python >= 3.11, a C++ compiler and the network, once; everything lands in .venv.

VENV := .venv
# Neighbouring tests share what they computed, so a process keeps its stretch until another has nothing left.
PYTEST_FLAGS := --numprocesses auto --maxprocesses 8 --dist worksteal
BIN := $(VENV)/bin
WHEEL_VENV := .venv-wheel

.PHONY: demo test spread lint wheel-test docs figures clean check-machine

demo: $(VENV)/.installed
	$(BIN)/sparsec demo

test: $(VENV)/.installed-dev
	$(BIN)/pytest $(PYTEST_FLAGS)

# Every template, direction, dtype and GPU architecture, and what else takes minutes.
spread: $(VENV)/.installed-dev
	$(BIN)/pytest $(PYTEST_FLAGS) -m spread

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Against what a user installs: the tests of what packaging can break, which are data files, entry points, and kernels
# compiled and served from there. That all templates are in it, byte for byte, is seen by itself.
WHEEL_TESTS := $(addprefix $(CURDIR)/tests/test_,$(addsuffix .py,autograd buffers cli cpu_backend data db device docs \
    examples explain expr figure gate imports masks module page planner records runtime saving template tuned_calls update))
# The second environment holds the wheel alone and borrows every other package from the first by a plain path line, which
# leaves the first one's editable install behind.
wheel-test: $(VENV)/.installed-dev
	rm -rf dist $(WHEEL_VENV)
	$(BIN)/python -m build --no-isolation --outdir dist . > /dev/null
	$(BIN)/python -m venv $(WHEEL_VENV)
	$(WHEEL_VENV)/bin/python -m pip install --quiet --no-deps dist/*.whl
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > "$$($(WHEEL_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	cd $(WHEEL_VENV) && bin/python -P -c 'import sys, sparsec; print("testing", sparsec.__file__); \
	    assert sparsec.__file__.startswith(sys.prefix)'
	diff -r -x __pycache__ templates \
	    "$$($(WHEEL_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/sparsec/_data/templates"
	cd $(WHEEL_VENV) && bin/python -P -m pytest $(PYTEST_FLAGS) --rootdir "$(CURDIR)" -c "$(CURDIR)/pyproject.toml" \
	    -o cache_dir="$(CURDIR)/$(WHEEL_VENV)/.pytest_cache" $(WHEEL_TESTS)

# A broken reference is an error; the tests run the pages' code.
docs: $(VENV)/.installed-dev
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build

# The tables of README.md and benchmarks/RESULTS.md, and the plots, from the committed results alone.
figures: $(VENV)/.installed-dev
	$(BIN)/python tools/bench_suite.py figures

clean:
	rm -rf $(VENV) $(WHEEL_VENV) build dist docs/_build .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache

# One stamp for what a user needs and one for what a developer needs; a newer pyproject.toml installs again.

$(VENV)/.installed: pyproject.toml constraints.txt | check-machine $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | check-machine $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(VENV)/.installed $@

# The first of these that is new enough; PYTHON=... chooses another.
PYTHON := $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && echo $$python && break; done)

$(BIN)/python: | check-machine
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
	    echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

check-machine:
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null || { \
	    echo "sparsec needs Python 3.11 or newer; found $$($(or $(PYTHON),python3) --version 2> /dev/null || echo none)." \
	        "Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@for compiler in "$${CXX:-g++}" g++ clang++ c++; do command -v "$${compiler%% *}" > /dev/null && exit 0; done; \
	    echo "sparsec compiles its CPU kernels on this machine, and found no C++ compiler." \
	        "Install g++ or clang++, or name one: make CXX=/path/to/compiler $(MAKECMDGOALS)" >&2; exit 1
