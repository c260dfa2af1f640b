# `make test` and `make demo` need python3 (with venv and pip) and make; they make .venv themselves.
# `make demo DATA_DIR=folder` uses the text in folder/wikitext2 (make hands DATA_DIR on by itself).

PYTHON ?= python3
VENV := .venv
BASE := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs

.PHONY: venv check test pins faults demo docs clean

venv: $(DEV)

# torch first, by itself, so that the pin and nothing else decides which build is taken.
$(BASE): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt torch
	$(VENV)/bin/python -m pip install -c constraints.txt -e .
	touch $@

# What the checks and tests need beside it; `make docs` has its own.
$(DEV): $(BASE)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

check: venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test: check
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n logical --maxprocesses 8

# Pins anew what tests/golden holds runs against, after a change that is meant to change it.
pins: venv
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/golden --pin

# Every kill, damaged file, full disk and race on a tiny model; SHARE=0.1 draws a tenth of them.
# Before them FUZZ examples of each kind of settings, texts, models and folders that nobody writes.
faults: venv
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 LRQUANT_FUZZ=$(or $(FUZZ),200) $(VENV)/bin/python -m pytest \
		tests/faults/test_fuzzing.py
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(VENV)/bin/python tests/faults/matrix.py --share $(or $(SHARE),1)

demo: $(BASE)
	$(VENV)/bin/python examples/demo.py

# The documentation site, in build/site; fails on a dead link or anchor.  Reads no network.
docs: $(DOCS)
	HF_HUB_OFFLINE=1 NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build

$(DOCS): $(BASE)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) .demo .pytest_cache .mypy_cache .ruff_cache build dist src/*.egg-info
	find src tests examples LRLLM benchmarks docs -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
