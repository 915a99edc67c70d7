# Every target keeps its environment in .venv and sets it up on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

.PHONY: demo test check campaign format bench clean

demo: $(READY)
	$(BIN)/llmcompress run recipes/demo.yaml --out out/demo --overwrite

test: $(READY)
	$(PYTEST)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)

campaign: $(READY) # rough ends, rivals, odd configs, damaged files, odd words: half an hour on two cores
	$(BIN)/python -m tests.campaign

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) # three hours on two cores
	$(BIN)/python evaluation/bench.py
	$(BIN)/python evaluation/ablation.py
	$(BIN)/python evaluation/throughput.py
	$(BIN)/python evaluation/cost.py
	$(BIN)/python evaluation/healing.py
	$(BIN)/python evaluation/distill_speed.py
	$(BIN)/python evaluation/speed.py
	$(BIN)/python evaluation/tables.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) out .pytest_cache .mypy_cache .ruff_cache .hypothesis
