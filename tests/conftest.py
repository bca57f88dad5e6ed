"""What every test runs under: no network, the CPU, examples that repeat."""

import atexit
import gc
import inspect
import logging
import os
import random
import shutil
import socket
import sys
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from tests.start import sitecustomize

# MLX hands every operation to a thread of its own. Where that is on another core, each
# hand-over wakes it, which costs more than small operations themselves. So a worker
# keeps to one core, and threads that are woken there wait for their turn.
if sys.platform == "linux" and (_name := os.environ.get("PYTEST_XDIST_WORKER")):
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cores[int(_name.removeprefix("gw")) % len(_cores)]})
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

# Set before anything imports huggingface_hub, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
# What tests learn of a machine is theirs alone; a process started by them shares it.
os.environ["MLX_GEMMA_MTP_CACHE"] = tempfile.mkdtemp(prefix="mlx_gemma_mtp-")

# Processes, also those that tests start, share what takes each of them long to find.
if sitecustomize.KEPT not in os.environ:
    os.environ[sitecustomize.KEPT] = _kept = tempfile.mkdtemp(prefix="mlx_gemma_mtp-")
    atexit.register(shutil.rmtree, _kept, ignore_errors=True)
    _paths = [str(Path(sitecustomize.__file__).parent)]
    _paths += filter(None, [os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join(_paths)
    sitecustomize.install()

import mlx.core as mx
import pytest
from hypothesis import settings
from mlx_lm.models import base as models_base

from mlx_gemma_mtp.cpu_kernels import compile_header
from mlx_gemma_mtp.engine import request as requests
from mlx_gemma_mtp.pair import planning
from mlx_gemma_mtp.pair.load import load_tokenizer
from tests import gemma, gemma_pair, tiny

# mlx-lm looks the names of its settings up for every key of every config: a tenth of
# what tests took that load and convert small checkpoints.
models_base.inspect = SimpleNamespace(signature=cache(inspect.signature))  # type: ignore[assignment]

# What tests write need not outlast the machine: to wait for its disk, thousands of
# times, proves nothing. Processes that are killed wait for it.
os.fsync = os.fstat  # type: ignore[assignment]

# Also where MLX has a GPU: what tests compare with are results of the CPU.
mx.set_default_device(mx.cpu)

# Texts without a seed: in CI those of a test are always the same, as its examples are.
_draws = random.Random()
requests.secrets = SimpleNamespace(randbits=_draws.getrandbits)  # type: ignore[assignment]

_worker = os.environ.get("PYTEST_XDIST_WORKER", "")
# Workers find what the process that starts them has made.
_header = None if _worker else compile_header()

atexit.register(shutil.rmtree, os.environ["MLX_GEMMA_MTP_CACHE"], ignore_errors=True)

# A probe takes a second for each pair; tests/exactness has what it finds.
planning._PROBE_BUDGET_S = 1e-9

settings.register_profile("local", deadline=None)
# Half as many where they are always the same; who looks for rare things asks for more.
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Let every second worker read the modules from the last one on.

    pytest writes their asserts anew and keeps that: where nothing is kept yet, two
    workers that meet in the middle do half of it each.
    """
    report = yield
    if isinstance(collector, pytest.Dir) and _worker[-1:] in tuple("13579"):
        report.result.reverse()
    return report


def pytest_collection_modifyitems(items):
    """The same order for every worker."""
    if _worker:
        items.sort(key=lambda item: item.path)


def pytest_runtest_setup(item):
    if os.environ.get("CI"):
        _draws.seed(item.nodeid)


def pytest_unconfigure():
    if _header:
        _header.wait()


def pytest_collection_finish():
    """Modules and tests stay: no garbage collection has to look at them again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _log_level():
    """A command sets how much the package says; the next test starts afresh."""
    package = logging.getLogger("mlx_gemma_mtp")
    level = package.level
    yield
    package.setLevel(level)


_connect = socket.socket.connect


def _connect_locally(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1"):
        self.close()  # or its destructor's warning hides the reason
        raise AssertionError(f"a test must not use the network: connects to {address}")
    return _connect(self, address)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", _connect_locally)


@pytest.fixture(scope="module")
def plain_graphs():
    """Nothing is compiled: for modules whose subject stands above the rounds."""
    with tiny.uncompiled():
        yield


@pytest.fixture(scope="module")
def every_core():
    """Threads that begin here run at once: for modules whose subject they are."""
    if sys.platform != "linux":
        yield
        return
    kept = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    yield
    os.sched_setaffinity(0, kept)


@pytest.fixture
def probes(monkeypatch):
    """Pairs are probed before they draft, also those of which it was given up."""
    monkeypatch.setattr(planning, "_PROBE_BUDGET_S", None)


@pytest.fixture(scope="session")
def gemma_tokenizer_folder(tmp_path_factory):
    """A folder with Gemma's small tokenizer and no chat template, only to be read."""
    with _tokenizer_folder(tmp_path_factory, gemma.SMALL_SIZE) as folder:
        yield folder


@pytest.fixture(scope="session")
def whole_gemma_tokenizer_folder(tmp_path_factory):
    """The same with the tokenizer of all ids."""
    with _tokenizer_folder(tmp_path_factory, gemma.VOCAB_SIZE) as folder:
        yield folder


@contextmanager
def _tokenizer_folder(tmp_path_factory, size):
    place = tmp_path_factory.mktemp("gemma") / "tokenizer"
    folder = gemma.write_tokenizer(place, size=size)
    # As pairs have it: what is loaded for them is the same then.
    (folder / "config.json").write_text('{"model_type": "gemma4_unified"}')
    with gemma.read_once(folder):
        yield folder


@pytest.fixture(scope="session")
def gemma_tokenizer(gemma_tokenizer_folder):
    """The small tokenizer of a form of the chat template, by its name: loaded once."""
    return _tokenizer_of_form(gemma_tokenizer_folder)


@pytest.fixture(scope="session")
def whole_gemma_tokenizer(whole_gemma_tokenizer_folder):
    """The same of all ids."""
    return _tokenizer_of_form(whole_gemma_tokenizer_folder)


def _tokenizer_of_form(folder):
    found = {}

    def tokenizer(form):
        if form not in found:
            template = {"chat_template": gemma.FORMS[form].template}
            found[form] = load_tokenizer(folder, template, gemma.EOS_IDS)
        return found[form]

    return tokenizer


@pytest.fixture(scope="session")
def gemma_pair_folder(tmp_path_factory, gemma_tokenizer_folder):
    """The folder of a random pair with a form's chat template, by the form's name.

    Its tokenizer is the small one. What lies in it is shared and not to be written to.
    """
    return _pair_of_form(tmp_path_factory, gemma_tokenizer_folder, gemma.SMALL_SIZE)


@pytest.fixture(scope="session")
def whole_gemma_pair_folder(tmp_path_factory, whole_gemma_tokenizer_folder):
    """The same of all ids."""
    folder = whole_gemma_tokenizer_folder
    return _pair_of_form(tmp_path_factory, folder, gemma.VOCAB_SIZE)


def _pair_of_form(tmp_path_factory, tokenizer_folder, size):
    place = tmp_path_factory.mktemp("gemma-pair")
    shared = gemma_pair.write_pair(place / "shared", tokenizer_folder, size)

    def pair_folder(form):
        folder = place / form
        if not folder.exists():
            folder.mkdir()
            for path in shared.iterdir():
                (folder / path.name).symlink_to(path)
            gemma.FORMS[form].write_template(folder)
        return folder

    return pair_folder
