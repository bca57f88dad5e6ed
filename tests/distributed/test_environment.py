"""How many ranks were launched, from the environment alone.

Run: python -m pytest tests/distributed/test_environment.py
"""

import pytest

from mlx_gemma_mtp.distributed.environment import num_launched
from mlx_gemma_mtp.errors import RanksError

TWO_HOSTS = '[["10.0.0.1:5000"], ["10.0.0.2:5000"]]'
FOUR_DEVICES = '[[null, "a", "b", "c"], ["a", null], ["b", "a"], ["c", "b"]]'


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "ranks.json"
        path.write_text(text)
        return str(path)

    return write


def test_an_ordinary_process_is_alone():
    assert num_launched({}) == 1
    assert num_launched({"MLX_HOSTFILE": "hosts.json", "PATH": "/bin"}) == 1


def test_the_ring(file):
    assert num_launched({"MLX_RANK": "1", "MLX_HOSTFILE": file(TWO_HOSTS)}) == 2


def test_mlx_launch_of_one_process_writes_an_empty_file(file):
    assert num_launched({"MLX_RANK": "0", "MLX_HOSTFILE": file("\n")}) == 1


@pytest.mark.parametrize("prefix", ["MLX", "JACCL"])
def test_jaccl(file, prefix):
    environ = {
        f"{prefix}_RANK": "3",
        f"{prefix}_IBV_DEVICES": file(FOUR_DEVICES),
        "MLX_JACCL_COORDINATOR": "10.0.0.1:5000",
    }
    assert num_launched(environ) == 4


def test_nccl():
    assert num_launched({"MLX_RANK": "1", "MLX_WORLD_SIZE": "2"}) == 2


def test_mpi():
    environ = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}
    assert num_launched(environ) == 4


@pytest.mark.parametrize("text", ["[[", "{}", "[]", '"hosts"', "3"])
def test_a_file_of_something_else_is_one_line(file, text):
    with pytest.raises(RanksError, match=r"^MLX_HOSTFILE must name .* got .*json\. "):
        num_launched({"MLX_RANK": "0", "MLX_HOSTFILE": file(text)})


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(RanksError, match="MLX_HOSTFILE must name"):
        num_launched({"MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "no")})


@pytest.mark.parametrize("rank", ["2", "-1", "", "zero"])
def test_a_rank_must_be_one_of_them(file, rank):
    with pytest.raises(RanksError, match=r"^MLX_RANK must be a rank below 2: got '"):
        num_launched({"MLX_RANK": rank, "MLX_HOSTFILE": file(TWO_HOSTS)})


@pytest.mark.parametrize("size", ["0", "-1", "", "two"])
def test_a_size_must_be_one(size):
    with pytest.raises(RanksError, match="OMPI_COMM_WORLD_SIZE must be a number"):
        num_launched({"OMPI_COMM_WORLD_SIZE": size})
