# make demo   install into .venv and watch an inner monologue        make test   install and run the tests
# make check  ruff, format, mypy --strict, tests                     make links  what type checkers read

PYTHON ?= python3
BIN := .venv/bin
ROOMS := agents backends graphs tasks traces training
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-real check links freeze clean

.venv/installed: pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints-dev.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints-dev.txt --editable '.[train]'
	@touch $@

.venv/dev: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints-dev.txt \
		'hypothesis>=6.100' 'mypy>=1.15' 'pytest>=8.3' 'pytest-asyncio>=1.0' 'ruff>=0.11' 'build>=1.2'
	@touch $@

demo: .venv/installed
	$(BIN)/monologue play --task shapes --graph monologue --split test --n 3 --live --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: .venv/dev
	$(BIN)/python -m pytest -q

# Real servers and browsers arrive with the parts that need them; each installs itself by its own script.
test-real: test

links:
	@mkdir -p .links/monologue
	@for room in $(ROOMS); do ln -sfn ../../$$room .links/monologue/$$room; done
	@for file in monologue/*.py monologue/py.typed; do ln -sfn ../../$$file .links/monologue/$$(basename $$file); done

check: .venv/dev links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

clean:
	rm -rf .venv .links build *.egg-info runs
