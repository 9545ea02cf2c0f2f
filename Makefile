# make demo: see it work.  make test: what CI runs.  Each target makes .venv and installs what it needs when missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint setup clean

demo: .venv/run.done
	$(BIN)/python tools/make_demo.py --output_dir demo --train

test: .venv/dev.done lint
	$(BIN)/python -m pytest

lint: .venv/dev.done
	$(BIN)/ruff check .

setup: .venv/dev.done

.venv/run.done: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/dev.done: .venv/run.done requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv demo
