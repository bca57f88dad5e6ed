"""Build the wheel and the source archive, and use the wheel where there is no checkout.

    python -m scripts.wheel_check

Both must hold what the tree holds, and be small. The wheel is then installed beside the
packages that it asks for, and no others, and every command runs. Those packages are
links to the ones of this environment, which pip has resolved by the same requirements.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PLACE = ROOT / "build" / "wheel-check"
PACKAGE = "mlx_gemma_mtp"
MAX_BYTES = 10_000_000
SCRIPTS = PLACE / "user" / "bin"
PYTHON = str(SCRIPTS / "python")
NAMES = ("", ".generate", ".chat", ".run", ".server", ".convert", ".selftest", ".tune")
SHORT = ("-p", "import ", "-m", "8")


def main() -> None:
    """Do all of it; an assertion or a command that fails ends it."""
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    wheel, sdist = build()
    check_contents(wheel, sdist)
    install(wheel)
    check_commands(wheel.name.split("-")[1])
    check_texts()


def build() -> tuple[Path, Path]:
    """Build the source archive, and the wheel from that."""
    command = ["-m", "build", "--no-isolation", "--outdir", "dist", str(ROOT)]
    run(sys.executable, *command)
    (wheel,), (sdist,) = PLACE.glob("dist/*.whl"), PLACE.glob("dist/*.tar.gz")
    return wheel, sdist


def check_contents(wheel: Path, sdist: Path) -> None:
    """Hold both against the tree."""
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {PACKAGE}, f"the wheel's top level must be {PACKAGE}: got {tops}"
    missing = sorted(_tree() - names)
    assert not missing, f"missing in the wheel: {missing}"
    for part in ("embedded", "embedded/drafter"):
        weights = f"{PACKAGE}/{part}/model.safetensors"
        assert weights in names, f"the embedded pair is not in the wheel: no {weights}"
    packed = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    for name in ("pyproject.toml", "README.md", "LICENSE", "convert/__init__.py"):
        assert name in packed, f"missing in the source archive: {name}"
    for file in (wheel, sdist):
        size = file.stat().st_size
        assert size <= MAX_BYTES, f"{file.name} must be at most 10 MB: got {size} bytes"
        print(f"{file.name}: {size / 1e6:.1f} MB")


def _tree() -> set[str]:
    """What the wheel must have, by the tree."""
    own = {path for path in (ROOT / PACKAGE).rglob("*") if path.is_file()}
    found = {str(path.relative_to(ROOT)) for path in own}
    converter = (ROOT / "convert").rglob("*.py")
    found |= {f"{PACKAGE}/{path.relative_to(ROOT)}" for path in converter}
    return {name for name in found if "__pycache__" not in name}


def install(wheel: Path) -> None:
    """Make an environment of the wheel and what it asks for."""
    run(sys.executable, "-m", "venv", "--without-pip", "user")
    pip = ["-m", "pip", "--python", PYTHON, "--disable-pip-version-check", "install"]
    run(sys.executable, *pip, "--no-deps", "--no-index", str(wheel))
    (place,) = PLACE.glob("user/lib/python*/site-packages")
    (found,) = distributions(name=PACKAGE, path=[str(place)])
    for needed in _needed(found, set()):
        for top in {path.parts[0] for path in needed.files or ()} - {".."}:
            source = Path(str(needed.locate_file(top)))
            if source.exists() and not (place / top).exists():
                (place / top).symlink_to(source)


def _needed(found: Distribution, seen: set[tuple[str, str]]) -> Iterator[Distribution]:
    """What a distribution asks for, without extras, and what that asks for."""
    yield from _needed_by(found, "", seen)


def _needed_by(
    found: Distribution, extra: str, seen: set[tuple[str, str]]
) -> Iterator[Distribution]:
    for text in found.requires or ():
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is not None and not marker.evaluate({"extra": extra}):
            continue
        needed = distribution(requirement.name)
        assert needed.version in requirement.specifier, f"{text}: got {needed.version}"
        for wanted in ("", *requirement.extras):
            if (requirement.name, wanted) not in seen:
                seen.add((requirement.name, wanted))
                yield needed
                yield from _needed_by(needed, wanted, seen)


def check_commands(version: str) -> None:
    """Start every command, as a script and as a module."""
    installed = {path.name for path in SCRIPTS.glob(f"{PACKAGE}*")}
    assert installed == {PACKAGE + name for name in NAMES}, installed
    for name in NAMES:
        run(str(SCRIPTS / (PACKAGE + name)), "--help")
    run(PYTHON, "-m", f"{PACKAGE}.generate", "--help")
    told = run(str(SCRIPTS / PACKAGE), "convert", "--version")
    assert told.startswith(f"{PACKAGE} {version},"), told
    # Without its extra the server says what is missing, in one line.
    (line,) = run(str(SCRIPTS / f"{PACKAGE}.server"), status=1).splitlines()
    assert line.endswith("[server]' brings it."), line
    assert "No module" in run(PYTHON, "-c", "import convert", status=1)


def check_texts() -> None:
    """Convert the embedded pair, and let every command that decodes decode."""
    code = f"import {PACKAGE}; print({PACKAGE}.embedded_pair_path())"
    source = run(PYTHON, "-c", code).strip()
    scripts = str(SCRIPTS / PACKAGE)
    run(f"{scripts}.convert", "--mlx-path", "pair", "--hf-path", source)
    run(f"{scripts}.generate", "--model", "pair", *SHORT)
    run(f"{scripts}.run", "mlx_lm.generate", "--model", "pair", *SHORT)
    run(f"{scripts}.generate", *SHORT)
    run(f"{scripts}.chat", "-m", "8", text="import os")


def run(*command: str, status: int = 0, text: str = "") -> str:
    """Run a command outside the checkout; what it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    ran = subprocess.run(
        command,
        cwd=PLACE,
        env=environment,
        input=text,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    line = " ".join([Path(command[0]).name, *command[1:]])
    assert ran.returncode == status, (
        f"{line} ended with {ran.returncode}:\n{ran.stdout}"
    )
    print(line)
    return ran.stdout


if __name__ == "__main__":
    main()
