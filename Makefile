# make demo   install into .venv and watch an inner monologue        make test   install and run the tests
# make check  ruff, format, mypy --strict, tests                     make links  what type checkers read
# make demo-latent  the same, thought instead of said
# make test-page  the page in real headless Chromium               make page   its screenshots and its benchmark

PYTHON ?= python3
BIN := .venv/bin
ROOMS := agents backends graphs tasks traces training
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

# make test-real  the tests against real SGLang, Chromium, Phoenix ...
.PHONY: demo demo-latent test test-real test-sglang test-phoenix test-trainers test-page page check links figures clean

.venv/installed: pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints-dev.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints-dev.txt --editable '.[train]'
	@touch $@

.venv/dev: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints-dev.txt --editable '.[train,dev]'
	@touch $@

demo: .venv/installed
	$(BIN)/monologue play --task shapes --graph monologue --families near,kin,twins --n 3 --live --out runs/demo-$$(date +%Y%m%d-%H%M%S)

demo-latent: .venv/installed
	$(BIN)/monologue play --task hops --graph latent:percent=0 --families hop2,hop3,hop4 --n 3 --live --out runs/demo-$$(date +%Y%m%d-%H%M%S)

# Two processes, a file's tests in one of them; one that is ended by a test that hangs is not begun again.
TESTS := $(BIN)/python -m pytest -q -n 2 --dist loadfile --max-worker-restart 0

test: .venv/dev
	$(TESTS)

# Against real programs; each is installed by its own script into an environment of its own.
test-real: test-sglang test-phoenix test-trainers test-page

test-sglang: .venv/dev
	tests_real/install_sglang.sh
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints-dev.txt --editable '.[chat]'
	$(BIN)/python -m pytest -q tests_real/served

.venv-phoenix/installed: tests_real/install_phoenix.sh pyproject.toml
	PYTHON=$(PYTHON) sh tests_real/install_phoenix.sh

test-phoenix: .venv-phoenix/installed
	.venv-phoenix/bin/python -m pytest -q -p no:phoenix tests_real/test_phoenix.py tests_real/test_inspect.py

.venv-trainers/done: tests_real/install_trainers.sh
	PYTHON=$(PYTHON) sh tests_real/install_trainers.sh .venv-trainers

test-trainers: .venv/dev .venv-trainers/done
	$(BIN)/python -m pytest -q -rs tests_real/test_trainers.py

test-page:
	PYTHON=$(PYTHON) tests_real/install_chromium.sh
	.venv-page/bin/python -m pytest -q tests_real/test_page_chromium.py

# The README's pictures of the page, and how long ten thousand episodes take to open.
page: .venv/installed
	PYTHON=$(PYTHON) tests_real/install_chromium.sh
	.venv-page/bin/python bench/screenshots.py
	.venv-page/bin/python bench/page.py

links:
	@mkdir -p .links/monologue
	@for room in $(ROOMS); do ln -sfn ../../$$room .links/monologue/$$room; done
	@for file in monologue/*.py monologue/py.typed; do ln -sfn ../../$$file .links/monologue/$$(basename $$file); done

check: .venv/dev links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(TESTS)

clean:
	rm -rf .venv .venv-* .links build *.egg-info runs

# Every figure of the README, from the shipped weights, on problems that no training has seen.
EVAL := $(BIN)/monologue eval
figures: .venv/installed
	$(EVAL) --graph blind,caption,direct,monologue --n 2000 --json bench/results/graphs.json
	$(EVAL) --graph monologue,direct --split combos --n 2000 --json bench/results/graphs-combos.json
	$(EVAL) --graph monologue --n 2000 --control shuffle-answers --json bench/results/shuffle-answers.json
	$(EVAL) --graph monologue --n 2000 --control wrong-picture --json bench/results/wrong-picture.json
	$(EVAL) --task looks --graph look --n 10000 --json bench/results/looks.json
	$(EVAL) --task looks --graph look --split combos --n 10000 --json bench/results/looks-combos.json
	$(BIN)/python bench/overhead.py
	$(BIN)/python bench/rollout.py
	$(BIN)/python bench/replay.py
	$(BIN)/python bench/rows.py
	$(BIN)/python bench/crash.py
