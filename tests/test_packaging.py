"""The wheel holds what the folders hold, and works without the repository. About half a minute."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"zoo": "zoo", "kernels": "zoo/kernels", "recipes": "zoo/recipes", "tools": "zoo/tools"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a clean copy: a stale build folder or egg-info would hide what is missing."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
    subprocess.run(command, check=True)
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_every_file(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"zoo/manifest/__init__.py", "zoo/manifest/manifest.json", "zoo/manifest/counts.json", "zoo/py.typed"}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".j2"):
                expected.add(f"{package}/{path.relative_to(ROOT / folder)}")
    assert held == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import timm, zoo; print(timm.get_pretrained_cfg('van_b0').license)", "apache-2.0"),
        ("from zoo.recipes.train import main; main()", "model: van_b1"),
    ],
    ids=["manifest", "configs"],
)
def test_wheel_works_anywhere(wheel, tmp_path, code, expected):
    target = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True)
    where = f"import zoo; assert zoo.__file__.startswith({str(target)!r}), zoo.__file__\n"
    result = subprocess.run(
        [sys.executable, "-c", where + code, "recipe=imagenet/van_b1", "--cfg", "job"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert expected in result.stdout


def test_commands_exist():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for target in project["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(__import__(module, fromlist=[function]), function))
