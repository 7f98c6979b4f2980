# `make demo` runs the main job on the bundled model, `make test` passes the tests; both set up .venv first.
PYTHON ?= python3
TOKENS ?= 200000
PORT ?= 8000
BIN := .venv/bin

.PHONY: venv models real demo serve test fuzz test-slow test-page test-gpu ray load lint

venv: .venv/installed

.venv/served: pyproject.toml constraints.txt  ## what a server needs
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 …" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint constraints.txt --editable .
	touch $@

.venv/converts: .venv/served  ## and to read GGUF files, as the real models come
	$(BIN)/pip install --constraint constraints.txt --editable '.[gguf]'
	touch $@

.venv/installed: .venv/served  ## and to work on it
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

models: venv  ## real models, fetched and converted once, in the user's cache
	$(BIN)/pacellm fetch

real: .venv/converts  ## SmolLM2 behind a server, asked ten questions about 4,000 tokens, or TOKENS with working memory
	$(BIN)/pacellm demo --model smollm2 $(if $(filter command line,$(origin TOKENS)),--tokens $(TOKENS))

demo: .venv/served  ## a question about a document of TOKENS tokens, over HTTP
	$(BIN)/pacellm demo --tokens $(TOKENS)

serve: .venv/served  ## a server on the bundled model
	$(BIN)/pacellm serve --port $(PORT)

test: venv lint models  ## everything that runs in minutes on a CPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

fuzz: venv  ## the property tests, on examples that nobody has tried
	$(BIN)/python -m pytest -m "hypothesis and not gpu" --hypothesis-profile=fresh

test-slow: venv  ## recall at length and other checks of minutes
	$(BIN)/python -m pytest -m slow

test-page: venv  ## the page in a headless Chromium, which has to be installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m page

test-gpu: venv  ## what needs a CUDA device
	$(BIN)/python -m pytest -m gpu

gpu-wheels: venv  ## what load_tests/gpu/first_light.sh wants where there is no network, for Python 3.12
	$(BIN)/pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		$(foreach glibc,2_39 2_34 2_31 2_28 2_17,--platform manylinux_$(glibc)_x86_64) --platform manylinux2014_x86_64 \
		--constraint constraints.txt --dest .gpu-wheels --requirement load_tests/gpu/wheels.txt

ray: .venv-ray/installed  ## sessions on a small Ray cluster: scaling, a replica killed
	.venv-ray/bin/python -m pytest -m slow tests/deploy/test_ray_serve.py

.venv-ray/installed: pyproject.toml constraints.txt  ## Ray wants another protobuf than the tests' other tools
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/pip install --quiet --constraint constraints.txt --editable '.[test,ray]'
	touch $@

load: venv  ## the load scenarios, in their small versions
	$(BIN)/python -m pytest -m slow tests/test_scenarios.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: check-deploy
check-deploy: venv  ## Dockerfiles, compose, manifests, alerts and dashboards; with the extra "deploy", kubectl, promtool
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,deploy]'
	PACELLM_CHECK_DEPLOY=1 $(BIN)/python -m pytest tests/test_deploy.py tests/deploy/test_deploy.py tests/deploy/test_dashboards.py
