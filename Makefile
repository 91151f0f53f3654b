# `make demo` and `make test` work on a fresh machine: both begin with `make setup`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
RUN    := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: setup transformers-tests demo test test-slow style check paper-tables tables bench-conversion bench-quality bench-factorization bench-decode \
	bench-cache-quality bench-memory bench-export bench-recovery bench-recovery-2m bench-recovery-memory reference-model clean

setup: $(STAMP)

# torch comes first and from its CPU build where pip finds one: a bare range would bring gigabytes of CUDA. The build is
# named in `constraints.txt`, which later installs obey too.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: setup
	$(RUN) $(BIN)/python -m benchmarks.demo

# The tests of Transformers come with its source distribution, not with the installed package: they are fetched once.
transformers-tests: setup
	$(BIN)/python -m tests.transformers_suite.fetch

test: setup transformers-tests
	$(RUN) $(BIN)/python -m pytest

test-slow: setup transformers-tests
	$(RUN) $(BIN)/python -m pytest -m slow

style: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

paper-tables: setup
	$(BIN)/python benchmarks/paper_tables.py

# Writes the committed results into the tables of README.md and docs/.
tables: setup
	$(BIN)/python -m benchmarks.tables

bench-conversion: setup
	$(RUN) $(BIN)/python -m benchmarks.conversion

bench-quality: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[report]"
	$(RUN) $(BIN)/python -m benchmarks.quality

bench-factorization: setup
	$(RUN) $(BIN)/python -m benchmarks.factorization

bench-decode: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[hqq,quanto,report]"
	$(RUN) $(BIN)/python -m benchmarks.decode

# CORPUS: the folder of books that the reference model was trained on.
bench-recovery: setup
	$(RUN) $(BIN)/python -m benchmarks.recovery --corpus $(CORPUS)

bench-recovery-2m: setup
	$(RUN) $(BIN)/python -m benchmarks.recovery --corpus $(CORPUS) --config benchmarks/configs/recovery_2m.json

bench-recovery-memory: setup
	$(RUN) $(BIN)/python -m benchmarks.recovery --config benchmarks/configs/recovery_memory.json --workers 1

bench-export: setup
	$(RUN) $(BIN)/python -m benchmarks.export

bench-memory: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[hqq,quanto]"
	$(RUN) $(BIN)/python -m benchmarks.memory

bench-cache-quality: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[hqq,quanto]"
	$(RUN) $(BIN)/python -m benchmarks.cache_quality

# Needs a folder of text files: make reference-model CORPUS=DIR [VARIANT=multi_head]
reference-model: setup
	$(BIN)/python benchmarks/train_reference_model.py --corpus $(CORPUS) --variant $(or $(VARIANT),reference)

clean:
	rm -rf $(VENV) demo_output build *.egg-info
