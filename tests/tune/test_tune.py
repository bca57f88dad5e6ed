"""The tune command: from data files to a drafter's folder.

Run: python -m pytest tests/tune/test_tune.py
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

import mlx.core as mx
import pytest

from mlx_gemma_mtp.checkpoints.weights import load_drafter
from mlx_gemma_mtp.pair.load import embedded_pair_path, load, load_tokenizer
from mlx_gemma_mtp.pair.pair import pair_of
from mlx_gemma_mtp.tune.__main__ import main, parse
from mlx_gemma_mtp.tune.data.documents import DocumentReader, Lengths
from mlx_gemma_mtp.tune.recording.material import choose
from mlx_gemma_mtp.tune.request import TextSettings
from mlx_gemma_mtp.tune.training.snapshot import read_snapshot
from mlx_gemma_mtp.tune.training.trainer import Trainer
from tests import tiny

WORDS = "the tea seat rain stone area line sat toe mean scan hall wall form".split()
SMALL = (
    "--prompt-tokens 8 --max-tokens 12 --num-texts 12 --num-held-out 4 --num-rows 4 "
    "--steps 6 --batch-size 2 --judge-every 2 --save-every 2 --num-draft-tokens 2 "
    "--learning-rate 0.01"
).split()


@pytest.fixture(autouse=True)
def _plain_graphs(monkeypatch):
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")  # also in processes that write texts
    with tiny.uncompiled():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "notes.jsonl"
    rng = random.Random(1)
    lines = [
        {"text": " ".join(rng.choices(WORDS, k=40)), "kind": rng.choice(["tea", "sea"])}
        for _ in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def arguments(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    paths = ["--model", str(model), "--data", str(data), "--output", str(output)]
    return [*paths, *SMALL, *more]


FEW_TEXTS = ("--num-texts", "4", "--num-held-out", "2")
TRAINED = ("--keep-work", "--temp", "1")


@pytest.fixture(scope="module")
def trained(model, data, tmp_path_factory) -> Path:
    """A drafter that was trained, and beside it what the run keeps: not to be changed.

    As ``main(arguments(model, data, trained, *TRAINED))`` leaves it.
    """
    output = tmp_path_factory.mktemp("trained") / "made"
    with tiny.uncompiled():
        assert main(arguments(model, data, output, *TRAINED)) == 0
    return output


def copied(trained: Path, place: Path) -> Path:
    for folder in (trained, work_of(trained)):
        shutil.copytree(folder, place / folder.name)
    return place / trained.name


def work_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.work")


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_drafter_is_trained_reported_and_loaded(model, data, tmp_path, capsys):
    output = tmp_path / "made"
    assert main(arguments(model, data, output, "--temp", "1")) == 0
    shown = capsys.readouterr()
    assert f"--draft-model {output}" in shown.out
    assert "tokens per round" in shown.out
    assert "step 6:" in shown.err
    (told,) = re.findall(".*the data has.*", shown.err)
    assert re.search(r" \d+ texts: 12 to learn from, \d to judge by; 1 of each", told)
    assert "600 to learn from were enough where it was measured: these are few" in told
    training = json.loads((output / "training.json").read_text())
    assert training["settings"]["steps"] == 6
    assert training["settings"]["temp"] == 1
    assert set(training["acceptance"]["after"]["kinds"]) <= {"tea", "sea"}
    assert [point["step"] for point in training["history"]] == [0, 2, 4, 6]
    assert set(training["minutes"]) == {"text", "measuring", "training"}
    assert training["peak_memory_bytes"] > 0
    assert "tokens per round" in (output / "README.md").read_text()
    assert (output / "plot.svg").exists()
    assert not (tmp_path / "made.work").exists()

    before, after = load_drafter(model / "drafter"), load_drafter(output)
    assert after.config == before.config
    assert not mx.array_equal(after.model.norm.weight, before.model.norm.weight)
    target, _ = load(model, draft_model=output)
    assert pair_of(target).drafter is not None


def test_the_command_of_the_card_runs_as_it_stands(
    model, data, trained, tmp_path, monkeypatch
):
    """In a shell, from where the training was begun, whatever folders are called."""
    monkeypatch.chdir(tmp_path)
    Path("target's folder").symlink_to(model)
    output = Path("$HOME & `more`")
    shutil.copytree(work_of(trained), work_of(output))
    made = arguments(Path("target's folder"), data, output, *TRAINED, "--resume")
    assert main(made) == 0
    text = (output / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(
        r"^`{3,}bash\n(mlx_gemma_mtp\.generate .*)\n`{3,}$", text, re.M
    )
    scripts = str(Path(sys.executable).parent)
    found = subprocess.run(
        ["sh", "-c", f"{command} --max-tokens 4"],
        env={**os.environ, "PATH": f"{scripts}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout


def test_target_says_the_same_with_the_new_drafter(model, trained):
    from mlx_gemma_mtp import generate_tokens

    prompt = [2, 40, 50, 60]
    texts = []
    for drafter in (None, model / "drafter", trained):
        target, _ = load(
            model,
            draft_model=drafter,
            speculative_decoding=drafter is not None,
        )
        texts.append(list(generate_tokens(pair_of(target), prompt, max_tokens=24)))
    assert texts[0] == texts[1] == texts[2]


def test_from_scratch_and_without_generating(model, data, tmp_path):
    output = tmp_path / "made"
    more = ("--from-scratch", "--no-generate", "--temp", "0.8", "--top-k", "20")
    assert main(arguments(model, data, output, *more, *FEW_TEXTS)) == 0
    training = json.loads((output / "training.json").read_text())
    assert training["drafter"] is None
    assert training["settings"]["generate"] is False
    assert training["settings"]["top_k"] == 20
    target, _ = load(model, draft_model=output)
    assert pair_of(target).drafter is not None


def test_training_that_brings_nothing_keeps_the_drafter(model, data, tmp_path, capsys):
    output = tmp_path / "made"
    more = ("--learning-rate", "1e-12", "--judge-every", "100")
    assert main(arguments(model, data, output, *more, *FEW_TEXTS)) == 0
    assert "no step was better" in capsys.readouterr().err
    training = json.loads((output / "training.json").read_text())
    # Steps behind the last measurement are measured.
    assert [point["step"] for point in training["history"]] == [0, 6]
    before, after = load_drafter(model / "drafter"), load_drafter(output)
    assert mx.array_equal(after.model.norm.weight, before.model.norm.weight)


def test_adapters_leave_the_head_as_it_is(model, data, tmp_path):
    output = tmp_path / "made"
    more = ("--lora-rank", "2", "--temp", "1", "--learning-rate", "0.1")
    assert main(arguments(model, data, output, *more, *FEW_TEXTS)) == 0
    before, after = load_drafter(model / "drafter"), load_drafter(output)
    assert mx.array_equal(
        after.model.embed_tokens.weight, before.model.embed_tokens.weight
    )
    assert not mx.array_equal(after.pre_projection.weight, before.pre_projection.weight)


@pytest.mark.slow
def test_killed_at_random_moments_it_resumes(model, data, tmp_path):
    """The folder is that of an unbroken run, byte for byte."""
    # Without g++ at work, and with a program to import once only.
    environment = {**os.environ, "MLX_DISABLE_COMPILE": "1"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def run(output: Path, seconds: float | None) -> int | None:
        command = [sys.executable, "-m", "mlx_gemma_mtp.tune"]
        command += arguments(model, data, output, "--resume", "--steps", "20")
        with subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            work, end = output.with_name(f"{output.name}.work"), 0.0
            while process.poll() is None:
                if seconds is not None and (work / "run.json").exists():
                    end = end or time.monotonic() + seconds
                    if time.monotonic() > end:
                        process.send_signal(signal.SIGKILL)
                time.sleep(0.01)
        return process.returncode

    assert run(whole, None) == 0
    seed = random.SystemRandom().randrange(2**32)
    rng = random.Random(seed)
    for seconds in [*(rng.uniform(0, 2) for _ in range(4)), None]:
        status = run(broken, seconds)
        assert status in (0, -signal.SIGKILL), f"seed {seed}"
        if status == 0:
            break
        # Killed when all was done but the removal of what it had kept.
        if broken.exists() and not broken.with_name("broken.work").exists():
            break
    assert weights_of(broken) == weights_of(whole), f"seed {seed}"
    assert not list(tmp_path.glob("*.work"))


def test_signal_is_answered_with_what_is_done(
    model, data, trained, tmp_path, capsys, monkeypatch
):
    numbers = {3: signal.SIGTERM, 5: signal.SIGHUP}
    # nohup has one of them ignored
    before = {n: signal.signal(n, signal.SIG_DFL) for n in numbers.values()}
    broken, step = tmp_path / "broken", Trainer._step

    def stopped(self):
        step(self)
        if self.progress.step in numbers:
            os.kill(os.getpid(), numbers[self.progress.step])

    monkeypatch.setattr(Trainer, "_step", stopped)
    command = arguments(model, data, broken, "--temp", "1")
    for done, number in numbers.items():
        assert main([*command, "--resume"]) == (128 + number)
        notes = capsys.readouterr().err.splitlines()
        assert notes[-1] == "interrupted; --resume goes on"
        (checkpoint,) = work_of(broken).glob("checkpoint-*")
        kept = read_snapshot(checkpoint)
        assert kept is not None
        assert kept.step == done  # by itself it keeps every second one
        assert signal.signal(number, before[number]) == signal.SIG_DFL
    assert main([*command, "--resume"]) == 0
    assert weights_of(broken) == weights_of(trained)


def test_run_that_was_cut_off_is_not_overwritten(
    model, data, trained, tmp_path, capsys
):
    kept = arguments(model, data, copied(trained, tmp_path), *TRAINED)
    assert main([*kept, "--force"]) == 1
    assert "--resume to go on" in capsys.readouterr().err
    assert main([*kept, "--force", "--resume", "--seed", "3"]) == 1
    assert "same texts: got another data, seed" in capsys.readouterr().err
    other = data.with_name("other.jsonl")
    other.write_text("\n".join(data.read_text().splitlines()[1:]) + "\n")
    again = [str(other) if value == str(data) else value for value in kept]
    assert main([*again, "--force", "--resume"]) == 1
    assert "got another data" in capsys.readouterr().err
    assert main([*kept, "--force", "--resume"]) == 0


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "line"),
        (b'{"text": "' + b"tea " * 20 + b'"}\n\xff\xfe\n', "line 2"),
        (b'{"text": "tea"', "line 1"),
        (b'["tea"]\n', "line 1"),
    ],
)
def test_bad_data_is_one_line_before_anything_is_written(
    model, tmp_path, capsys, contents, message
):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(contents)
    assert main(arguments(model, path, tmp_path / "made")) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert str(path) in error
    assert message in error or not contents
    assert [found.name for found in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--from-scratch", "--draft-model", "x"], "--from-scratch must be left out"),
        (["--from-scratch", "--lora-rank", "2"], "--lora-rank must be left out"),
        (["--steps", "0"], "--steps must be 1 or more"),
        (["--num-rows", "0"], "--num-rows must be 1 or more"),
        (["--temp", "-1"], "temp must be 0 or more"),
        (["--chat-template-config", "[]"], "must be a JSON object"),
        (["--max-tokens", "1000000"], "context"),
        (["--max-tokens", "1"], "--max-tokens must be 2 or more"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--learning-rate", "inf"], "--learning-rate must be above 0 and finite"),
        (["--draft-model", "nowhere/at-all/x"], "nowhere/at-all/x"),
    ],
)
def test_mistakes_are_one_line(model, data, tmp_path, capsys, more, message):
    assert main(arguments(model, data, tmp_path / "made", *more)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


def test_drafter_of_another_target_is_refused(model, data, tmp_path, capsys):
    drafter = str(embedded_pair_path() / "drafter")
    more = ("--draft-model", drafter)
    assert main(arguments(model, data, tmp_path / "made", *more)) == 1
    assert "error:" in capsys.readouterr().err


def test_a_drafter_that_was_found_and_cannot_be_read(model, data, tmp_path, capsys):
    spoilt = tmp_path / "spoilt"
    shutil.copytree(model, spoilt)
    path = spoilt / "drafter" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    more = ("--work", str(tmp_path / "work"))
    assert main(arguments(spoilt, data, tmp_path / "made", *more)) == 1
    error = capsys.readouterr().err
    assert "cut off" in error
    assert "--from-scratch" in error


def test_place_that_is_taken_is_refused_at_once(model, data, tmp_path, capsys):
    output = tmp_path / "made"
    output.mkdir()
    (output / "letter.txt").write_text("dear")
    assert main(arguments(model, data, output)) == 1
    assert "must not be there yet" in capsys.readouterr().err
    assert (output / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("more", [(), ("--work", "file/work")])
def test_place_that_cannot_be_made_is_refused_at_once(data, tmp_path, capsys, more):
    """Before the target is even looked for."""
    (tmp_path / "file").touch()
    more = [text.replace("file", str(tmp_path / "file")) for text in more]
    output = tmp_path / "made" if more else tmp_path / "file" / "made"
    assert main(arguments(tmp_path / "none", data, output, *more)) == 1
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert "must be a folder that can be written: got Not a directory" in error[0]


@pytest.mark.parametrize("work", ["made", "made/work", "."])
def test_work_and_output_are_apart(model, data, tmp_path, capsys, work):
    more = ("--work", str(tmp_path / work))
    assert main(arguments(model, data, tmp_path / "made", *more)) == 1
    assert "--work must be outside --output" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_home_of_nobody_is_a_name_like_others(model, data):
    request = parse(arguments(model, data, Path("~nobody.here/made")))
    assert request.place == Path.cwd() / "~nobody.here" / "made"


def test_output_must_have_a_name(model, data, capsys):
    assert main(arguments(model, data, Path("/"))) == 1
    assert "--output must name a folder" in capsys.readouterr().err


def test_other_training_settings_keep_the_texts(model, data, trained, tmp_path, capsys):
    output = copied(trained, tmp_path)
    kept = arguments(model, data, output, *TRAINED)
    records = work_of(output) / "records"
    before = {path.name: path.stat().st_mtime_ns for path in records.iterdir()}
    first = weights_of(output)
    more = ("--resume", "--learning-rate", "0.003")
    assert main([*kept, *more]) == 1
    error = capsys.readouterr().err
    assert "another learning_rate than before" in error
    assert "must not be there yet" in error
    assert weights_of(output) == first
    assert main([*kept, *more, "--force"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in records.iterdir()} == before
    assert weights_of(output) != first
    capsys.readouterr()


def test_another_target_at_the_same_place_is_noticed(data, trained, tmp_path, capsys):
    model = tiny.model_folder(tmp_path / "tiny")
    kept = arguments(model, data, copied(trained, tmp_path), *TRAINED)
    assert main([*kept, "--force", "--resume"]) == 0  # the very same is none
    path = str(model / "model.safetensors")
    weights = cast(dict[str, mx.array], mx.load(path))
    name = next(name for name in weights if name.endswith("mlp.up_proj.weight"))
    changed = weights[name] * mx.where(mx.arange(weights[name].shape[1]) == 3, 2, 1)
    mx.eval(changed)
    weights = {**weights, name: changed.astype(weights[name].dtype)}
    mx.eval(weights)
    mx.save_safetensors(path, weights, {"format": "pt"})
    capsys.readouterr()
    assert main([*kept, "--force", "--resume"]) == 1
    assert "same texts: got another target" in capsys.readouterr().err


def test_loss_that_is_no_number_is_one_line(model, data, tmp_path, capsys):
    more = ("--temp", "1", "--learning-rate", "1e30", *FEW_TEXTS)
    assert main(arguments(model, data, tmp_path / "made", *more)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the loss must be a number")
    assert (tmp_path / "made.work" / "records").exists()


def test_full_disk_is_one_line(model, data, tmp_path, capsys, monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlx_gemma_mtp.tune.recording.arrays.os.replace", fail)
    assert main(arguments(model, data, tmp_path / "made")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "must be writable: got No space left on device" in error


def test_run_that_was_done_is_only_cleaned_up(model, data, trained, tmp_path):
    """As after a kill between the drafter's appearance and the end."""
    output = copied(trained, tmp_path)
    assert main([*arguments(model, data, output, "--temp", "1"), "--resume"]) == 0
    assert weights_of(output) == weights_of(trained)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_checkpoint_at_another_place_is_not_replaced(
    model, data, trained, tmp_path, capsys
):
    work, other = tmp_path / "work", tiny.model_folder(tmp_path / "other")
    shutil.copytree(work_of(trained), work)
    before = weights_of(other)
    again = arguments(model, data, other, *TRAINED, "--work", str(work), "--resume")
    assert main(again) == 1
    assert "must not be there yet" in capsys.readouterr().err
    assert weights_of(other) == before


def test_too_little_data_is_told(model, tmp_path, capsys):
    path = tmp_path / "one.jsonl"
    path.write_text(
        json.dumps({"text": "tea sat here and was mean to the hall"}) + "\n"
    )
    assert main(arguments(model, path, tmp_path / "made")) == 1
    told = capsys.readouterr().err
    assert "must have texts to judge by" in told
    assert "one in 16: got 3 texts in 1 of them" in told
    assert "so that there are 34" in told
    reader = DocumentReader(load_tokenizer(model), Lengths(8, 12, 512), generate=True)
    path.write_text(
        "\n".join(json.dumps({"text": f"{i} sat here and was mean"}) for i in range(34))
    )
    chosen = choose(reader.read([path]), None, TextSettings(), 0)
    assert not chosen.is_judge_reported
