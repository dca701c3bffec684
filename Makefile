# Each target first creates .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Two test processes with one thread each are faster than one with two: torch's threads do not compete for the cores.
# Images of containers often forbid Python to write bytecode; each process would compile all tests again, for seconds.
TEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n auto --dist loadgroup -m "not gpu and not browser"

.PHONY: demo test test-all check browser bench speed compiled sizes probes gpu recipes docs notebooks tables lint types clean

demo: $(VENV)/user.stamp  ## train a small VAN on handwritten digits
	$(BIN)/zoo-train

test: $(VENV)/dev.stamp  ## the tests without the longest ones
	$(TEST) -m "not long and not gpu and not browser"

test-all: $(VENV)/dev.stamp  ## all tests
	$(TEST)

# Thousands of tests that take milliseconds are handed out in large parts; one by one adds 2 ms to each.
check: lint  ## lint and the quick tests
	$(TEST) --dist worksteal -m "not slow and not long and not gpu and not browser"

browser: $(VENV)/dev.stamp  ## the reports in a real browser, as wide as a phone and a desktop
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	  { echo "make browser needs Chromium and its driver: apt-get install chromium chromium-driver"; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/pytest -m browser tests/browser

bench: $(VENV)/user.stamp  ## time the operators on this machine's CPU
	$(BIN)/zoo-bench kernels

speed: $(VENV)/dev.stamp  ## measure the models for the README: half an hour on two cores that do nothing else
	$(BIN)/zoo-bench models --threads 2 --dtype float32 bfloat16 --json docs/results/models-cpu.json --picture docs/images/speed.png
	ZOO_SNAPSHOT=1 $(BIN)/pytest -q tests/test_docs.py::test_tables_are_up_to_date

COMPILED := biformer_tiny cswin_tiny dinat_mini gc_vit_tiny litv2_small maxvit_tiny van_b1
compiled: $(VENV)/dev.stamp  ## measure some models compiled, for the README: two hours on two cores
	$(BIN)/zoo-bench models --threads 2 --dtype float32 bfloat16 --compile --no-training \
	  --json docs/results/compiled-cpu.json $(COMPILED)
	$(BIN)/zoo-bench models --threads 2 --compile --no-inference --json docs/results/compiled-training-cpu.json $(COMPILED)
	ZOO_SNAPSHOT=1 $(BIN)/pytest -q tests/test_docs.py::test_tables_are_up_to_date

sizes: $(VENV)/dev.stamp  ## measure time and memory of some models for larger images, for the README
	for size in 224 512 1024 2048; do $(BIN)/zoo-bench models --threads 2 --batch-size 1 --no-training --size $$size \
	  --rounds 3 --seconds 10 --json docs/results/sizes-cpu-$$size.json dinat_mini vig_h_t segman_encoder_t || exit 1; done
	ZOO_SNAPSHOT=1 $(BIN)/pytest -q tests/test_docs.py::test_tables_are_up_to_date

probes: $(VENV)/dev.stamp  ## probe the features of the small models, for docs/guides/probes.md: ten minutes
	OMP_NUM_THREADS=1 $(BIN)/python -P tests/probes.py
	ZOO_SNAPSHOT=1 $(BIN)/pytest -q tests/test_docs.py::test_tables_are_up_to_date

gpu: $(VENV)/dev.stamp  ## on a machine with a GPU: tests and timings, written to docs/results
	PYTHON=$(BIN)/python tools/gpu_session.sh

recipes: $(VENV)/dev.stamp  ## write the recipes of recipes/conf/recipe from recipes/tables
	$(BIN)/python recipes/tables/write.py

docs: $(VENV)/dev.stamp  ## the documentation as a site, build/docs/index.html
	$(BIN)/sphinx-build --fail-on-warning --keep-going -q -c docs . build/docs

notebooks: $(VENV)/dev.stamp  ## execute the notebooks of docs/examples, and write their outputs into them
	ZOO_SNAPSHOT=1 $(BIN)/pytest -q tests/test_docs.py::test_notebook_runs

tables: $(VENV)/dev.stamp  ## write counts.json, dense_counts.json, shapes.json.xz and the tables of README and docs
	ZOO_SNAPSHOT=1 $(BIN)/pytest -q tests/tools/test_models.py::test_all_counts_are_right
	ZOO_SNAPSHOT=1 $(BIN)/pytest -q tests/recipes/test_dense_counts.py::test_all_counts_are_right
	ZOO_SNAPSHOT=1 $(BIN)/pytest -q tests/zoo/test_recognition.py::test_all_shapes_are_right
	ZOO_SNAPSHOT=1 $(BIN)/pytest -q tests/test_docs.py::test_tables_are_up_to_date

lint: types  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp  ## mypy over zoo and zoo.kernels
	rm -rf build/types && mkdir -p build/types/zoo
	cd build/types/zoo && ln -s ../../../zoo/* ../../../kernels ../../../recipes ../../../tools .
	ln -s ../../../checkpoints build/types/zoo/manifest
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, this is {sys.version}")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/user.stamp: pyproject.toml setup.py constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train]'
	touch $@

$(VENV)/dev.stamp: pyproject.toml setup.py constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,dense]'
	touch $@ $(VENV)/user.stamp
