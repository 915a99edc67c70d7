# Every target keeps its environment in .venv and sets it up on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow test-all test-kernels check campaign format bench clean

demo: $(READY)
	$(BIN)/llmcompress run recipes/demo.yaml --out out/demo --overwrite

test: $(READY) # every feature once, in five minutes on two cores
	$(PYTEST) -m "not slow"

test-slow: $(READY) # the rest: whole runs in processes of their own, every family, the fault campaign
	$(PYTEST) -m slow

test-all: test-slow test

# The Triton kernels without a GPU, by Triton's interpreter and through its compiler; torch for CPUs comes
# without Triton, and .venv stays so.
test-kernels: $(READY) out/triton/.ready
	TRITON_INTERPRET=1 PYTHONPATH=out/triton $(BIN)/python -m pytest -m gpu tests/kernels
	PYTHONPATH=out/triton $(BIN)/python -m pytest tests/kernels/test_triton_compiles.py

out/triton/.ready:
	$(BIN)/pip install --quiet --no-deps --upgrade --target out/triton triton==3.9.0
	touch $@

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m evaluation tables --check
	$(BIN)/python -m evaluation pictures --check
	$(MAKE) test-all

campaign: $(READY) # rough ends, rivals, odd configs, damaged files, odd words: half an hour on two cores
	$(BIN)/python -m tests.campaign

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Every table and picture; durations are those of two cores. The rivals install their own environments from the registry.
# speed, decode-speed and lookup-speed write the file of this processor; with a GPU, `speed --eight-billion` writes speed-cuda.json, and
# evaluation/gpu_run.sh measures in eight minutes what else wants one.
bench: $(READY) # sixteen hours
	$(BIN)/python -m evaluation bench # 6 h
	$(BIN)/python -m evaluation rivals # 20 min
	$(BIN)/python -m evaluation ablation # 15 min
	$(BIN)/python -m evaluation outliers # 15 min
	$(BIN)/python -m evaluation bos # 10 min
	$(BIN)/python -m evaluation pruning # 1 h
	$(BIN)/python -m evaluation rivals-pruning # 30 min
	$(BIN)/python -m evaluation healing # 1 h
	$(BIN)/python -m evaluation sharing # 6 h
	$(BIN)/python -m evaluation compression-speed # 5 h
	$(BIN)/python -m evaluation cost # 8 min
	$(BIN)/python -m evaluation several-processes # 15 min
	$(BIN)/python -m evaluation vocabulary-memory # 10 min
	$(BIN)/python -m evaluation foretold # 10 min
	$(BIN)/python -m evaluation throughput # 2 min
	$(BIN)/python -m evaluation distill-speed # 10 min
	$(BIN)/python -m evaluation speed # 6 min
	$(BIN)/python -m evaluation decode-speed # 15 min
	$(BIN)/python -m evaluation lookup-speed # 5 min
	$(BIN)/python -m evaluation codebook-speed # 3 min
	$(BIN)/python -m evaluation pruned-speed # 3 min
	$(BIN)/python -m evaluation import-time # 3 min
	$(BIN)/python -m evaluation advise-time # 2 min
	$(BIN)/python -m evaluation tables
	$(BIN)/python -m evaluation pictures

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache .hypothesis
