# `make` lists the targets. Each sets up what it needs in .venv, once; a second call starts at once.

# Any Python from 3.10 to 3.12.
PYTHON ?= python3

# Where the environment goes.
VENV ?= .venv

# Arguments for the command behind a target: make quickstart ARGS="--seed 2", make test ARGS="-k hysteretic".
ARGS ?=

# Arguments for every pip call, for a package mirror for instance.
PIP_ARGS ?=

# What pip is asked for instead of the CPU build of torch that is looked for below:
#   make quickstart TORCH="torch==2.13.0 --index-url <the CPU index, see pytorch.org>"
TORCH ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_ARGS)
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python

# uv does not read pip's configuration: a mirror named in the environment counts for both.
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif

# Packages are installed without bytecode, which Python then writes for what is imported. Without it, each of verl's dozen
# processes would compile all of torch and transformers again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test test-megatron test-verl test-verl-0.8 .test-verl-0.8 test-trl test-slime test-openrlhf .test-openrlhf test-training test-trainers test-recipes test-all gpu-proof bench install install-dev install-vllm lint format docs lock clean

help:  ## List the targets.
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

quickstart: install  ## Train Countdown with A-HPO in verl on this machine, and show the curves.
	$(BIN)/hpo-plugin quickstart $(ARGS)

test: install-dev  ## Run the tests, without the training runs.
	$(BIN)/python -m pytest $(ARGS)

VERL ?= 0.9.0

# The other verl is a copy of its own over the same environment, found before the installed one.
test-verl: install-dev  ## Run the tests of the verl adapter and the recipes with another verl: VERL=0.9.0.
	$(PIP) --no-deps --upgrade --target $(abspath $(VENV))/verl-$(VERL) verl==$(VERL)
	PYTHONPATH=$(abspath $(VENV))/verl-$(VERL) $(BIN)/python -m pytest tests/verl tests/recipe $(ARGS)

MEGATRON := megatron-core==0.16.1 mbridge==0.15.1 einops==0.8.2

# Beside the environment, not in it: with megatron-core installed, every process of verl would import it.
test-megatron: install-dev  ## Test verl's Megatron engine on CPU, and train a recipe with it; ARGS="-m ''": all layouts.
	$(PIP) --no-deps --upgrade --target $(abspath $(VENV))/megatron $(MEGATRON)
	PYTHONPATH=$(abspath $(VENV))/megatron $(BIN)/python -m pytest tests/verl/test_megatron.py \
		tests/verl/test_data_parallel_groups.py tests/recipe/test_executed.py -m "not slow" -k "not fsdp2" $(ARGS)

test-trainers: install-vllm  ## Train a few steps with each of verl's trainers and with common options of a run, on CPU.
	$(BIN)/python -m pytest tests/cpu -m e2e $(ARGS)

test-recipes: install-dev  ## Train three steps of every task and engine of hpo_recipe, on CPU.
	$(PIP) --no-deps --upgrade --target $(abspath $(VENV))/megatron $(MEGATRON)
	PYTHONPATH=$(abspath $(VENV))/megatron $(BIN)/python -m pytest tests/recipe/test_executed.py -m e2e $(ARGS)

TRL ?= 1.16.0

# Beside the environment, as above: what TRL needs is there, but for TRL.
test-trl: install-dev  ## Test the TRL adapter and the contribution to TRL, gradients over one and two processes included: TRL=1.16.0.
	$(PIP) --no-deps --upgrade --target $(abspath $(VENV))/trl-$(TRL) trl==$(TRL)
	PYTHONPATH=$(abspath $(VENV))/trl-$(TRL) $(BIN)/python -m pytest tests/trl tests/upstream/test_trl_contribution.py $(ARGS)

SLIME ?= slime

test-slime: install-dev  ## Test the hook for slime with slime's own loss: SLIME=<a checkout of slime>.
	$(PIP) --no-deps --upgrade --target $(abspath $(VENV))/megatron $(MEGATRON)
	PYTHONPATH=$(abspath $(SLIME)):$(abspath $(VENV))/megatron $(BIN)/python -m pytest tests/test_slime.py $(ARGS)

# verl 0.8 asks for NumPy 1, and loads no plugins.
test-verl-0.8:  ## Run the tests of estimator, policy loss and gradients with verl 0.8, in an environment of its own.
	$(MAKE) VENV=$(VENV)-verl-0.8 .test-verl-0.8

.test-verl-0.8: $(VENV)/.torch
	$(UV) -r requirements/verl-0.8.in
	$(UV) --no-deps --editable .
	VERL_USE_EXTERNAL_MODULES=hpo_plugin.verl.plugin $(BIN)/python -m pytest \
		tests/verl/test_self_test.py tests/verl/test_losses.py tests/verl/test_equivalence.py $(ARGS)

OPENRLHF ?= 0.11.2

# OpenRLHF asks for transformers 5.15, which verl excludes. DeepSpeed is built with the torch that is there, without kernels.
test-openrlhf:  ## Test the OpenRLHF adapter, gradients included, in an environment of its own: OPENRLHF=0.11.2.
	$(MAKE) VENV=$(VENV)-openrlhf .test-openrlhf

.test-openrlhf: $(VENV)/.torch
	$(UV) setuptools wheel
	DS_BUILD_OPS=0 $(UV) --no-build-isolation-package deepspeed -r requirements/openrlhf.in
	$(UV) --no-deps openrlhf==$(OPENRLHF) --editable .
	$(BIN)/python -m pytest tests/openrlhf $(ARGS)

test-training: install-vllm  ## Train a few steps with verl's trainer and A-HPO, with each rollout; kill a quickstart, resume.
	$(BIN)/python -m pytest -m "e2e and not slow" $(ARGS)

test-all: install-vllm  ## Run all tests, with the training runs of both rollout backends.
	$(BIN)/python -m pytest -m "" $(ARGS)

# In the environment that has CUDA and vLLM, not in .venv, whose torch is the CPU build.
gpu-proof:  ## Prove on one GPU that this is right, fast and trains (docs/gpu.md): PYTHON=<with CUDA, verl and vLLM>.
	PYTHONPATH=$(CURDIR)$(PYTHONPATH:%=:%) $(PYTHON) scripts/gpu_proof.py $(ARGS)

bench: install-dev  ## Measure what docs/benchmarks.md promises; with ARGS=--whole-step, training runs too.
	$(BIN)/python -m benchmarks $(ARGS)

lint: install-dev  ## Check style, format and types.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: install-dev  ## Format the code.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: install-dev  ## Build the documentation in site/; a broken link is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

install: $(VENV)/.cpu  ## Set up .venv for the CPU path.

install-dev: $(VENV)/.dev  ## The same, with what tests, lint and docs need.

install-vllm: $(VENV)/.cpu-vllm  ## The same, with verl's vLLM rollout on CPU (Linux).

# The three sets agree in every version, so that one environment serves all of them: the largest is resolved first.
lock: $(BIN)/uv  ## Resolve requirements/*.txt anew, keeping the versions that still fit.
	cd requirements && for set in "cpu-vllm --extra cpu-vllm --extra dev" \
		"dev --extra cpu --extra dev --constraints cpu-vllm.txt" "cpu --extra cpu --constraints dev.txt"; do \
		$(abspath $(BIN)/uv) pip compile ../pyproject.toml --quiet --universal --python-version 3.10 \
			--custom-compile-command "make lock" --annotation-style line --output-file $${set%% *}.txt $${set#* } || exit 1; \
	done

clean:  ## Remove the environment and everything built; runs and data stay.
	rm -rf .venv .venv-verl-0.8 .venv-openrlhf build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find hpo_plugin hydra_plugins benchmarks contrib tests recipes -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || { \
		echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); hpo-plugin needs Python 3.10, 3.11 or 3.12: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "Setting up $(VENV) ..."
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) uv

# The CPU build of torch: from where pip already looks, else from PyTorch's own CPU index, which uv knows. Plain `torch`
# from the default index brings gigabytes of CUDA packages on Linux, so it is taken only where TORCH asks for it.
$(VENV)/.torch: $(BIN)/uv
ifneq ($(TORCH),)
	$(PIP) --no-deps $(TORCH)
else
	$(PIP) --no-deps torch==2.13.0+cpu || $(UV) --no-deps --torch-backend cpu torch==2.13.0 || { \
		echo 'No CPU build of torch 2.13.0 found. Say where it is: make TORCH="torch==2.13.0 --index-url <index>" ...' >&2; exit 1; }
endif
	@touch $@

# uv takes a fifth of pip's CPU time for the same versions; pip stays as the way out where uv cannot reach an index.
$(VENV)/.cpu $(VENV)/.dev $(VENV)/.cpu-vllm: $(VENV)/.%: requirements/%.txt pyproject.toml $(VENV)/.torch
	$(UV) --no-deps -r $< || $(PIP) --no-deps -r $<
	$(UV) --no-deps --editable . || $(PIP) --no-deps --editable .
	@touch $@
