"""The model tests of the installed timm, run on our models. All slow, 3 min.

They are neither in timm's wheel nor in this repository: the source distribution is fetched once, into pytest's cache.
"""

import os
import subprocess
import sys
import tarfile
import textwrap
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

import pytest
import timm
import torch

import zoo

# The tests that timm runs on every model, except those of torch.jit, which is deprecated in favour of torch.export, and
# those that need weights from a hub.
TESTS = {
    "test_model_forward",
    "test_model_backward",
    "test_model_default_cfgs",
    "test_model_default_cfgs_non_std",
    "test_model_forward_features",
    "test_model_forward_intermediates",
    "test_model_forward_intermediates_features",
    "test_prune_intermediate_layers_contract",
    "test_model_forward_fx",
    "test_model_backward_fx",
}

# The two tests of configurations: of models whose features are maps, and of others.
CONFIGURATIONS = {"test_model_default_cfgs", "test_model_default_cfgs_non_std"}

# Placed beside timm's file: registers our models before timm's lists of parameters are built, and selects tests.
CONFTEST = """
    import os

    import zoo

    def pytest_collection_modifyitems(items):
        models, tests = os.environ["ZOO_MODELS"].split(), os.environ["ZOO_TESTS"].split()

        def chosen(item):
            name = item.callspec.params.get("model_name") if hasattr(item, "callspec") else None
            return isinstance(name, str) and name.split(".")[0] in models and item.originalname in tests

        items[:] = filter(chosen, items)
"""


@pytest.fixture(scope="session")
def timm_tests(pytestconfig) -> str:
    """Text of timm's tests/test_models.py."""
    folder = pytestconfig.cache.mkdir(f"timm-{timm.__version__}")
    path = folder / "test_models.py"
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=timm", f"--dest={folder}"]
        download = subprocess.run([*pip, f"timm=={timm.__version__}"], capture_output=True, text=True)
        if download.returncode:
            pytest.fail(f"Could not download the source of timm {timm.__version__} from PyPI: {download.stderr[-500:]}")
        (archive,) = folder.glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            text = tar.extractfile(f"timm-{timm.__version__}/tests/test_models.py").read()
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(text)
        partial.replace(path)
    return path.read_text()


def run_timm_tests(text: str, folder: Path, models: list[str]) -> None:
    marker = "FEAT_INTER_FILTERS = ["
    assert text.count(marker) == 1, "timm has renamed the list of modules whose intermediates it tests"
    modules = [name for name in zoo.FAMILIES if timm.list_models(module=name)]
    own = "'test_vit*'"  # of timm's models that are tested less; test_vitae_vsa is none of these
    assert text.count(own) == 1, "timm has renamed its small ViT for tests"
    text = text.replace(marker, f"{marker}*{modules}, ").replace(own, "'test_vit'")
    # timm has another test of the configurations of models whose features are sequences.
    sequences = [name for name in models if features_dims(name) == 3]
    for filters in ("EXCLUDE_FILTERS + NON_STD_FILTERS", "filter=NON_STD_FILTERS"):
        assert text.count(f"{filters},") == 1, "timm has renamed its list of models with other features"
        text = text.replace(f"{filters},", f"{filters} + {[f'{name}*' for name in sequences]},")
    (folder / "test_models.py").write_text(text)
    (folder / "conftest.py").write_text(textwrap.dedent(CONFTEST))
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", "--junit-xml=report.xml"]
    environment = {**os.environ, "ZOO_MODELS": " ".join(models), "ZOO_TESTS": " ".join(TESTS)}
    run = subprocess.run([*command, "test_models.py"], cwd=folder, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]

    passed = defaultdict(set)
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        assert case.find("skipped") is None, f"{case.get('name')} was skipped"
        test, _, parameters = case.get("name").partition("[")
        passed[test].add(parameters)
    wanted = dict.fromkeys(TESTS - CONFIGURATIONS, len(models))
    for test, names in zip(sorted(CONFIGURATIONS), (set(models) - set(sequences), sequences), strict=True):
        wanted |= {test: len(timm.list_models(list(names), include_tags=True))} if names else {}
    assert {test: len(cases) for test, cases in passed.items()} == wanted


def features_dims(name: str) -> int:
    """The dimensions of what `forward_features` returns."""
    model = timm.create_model(name, device="meta").eval()
    return model.forward_features(torch.zeros(1, *model.default_cfg["input_size"], device="meta")).ndim


def size(name: str) -> int:
    return sum(parameter.numel() for parameter in timm.create_model(name, device="meta").parameters())


@pytest.mark.long
@pytest.mark.parametrize("module", zoo.FAMILIES)
def test_timms_own_tests_pass_on_a_familys_smallest_models(timm_tests, tmp_path, module):
    models = timm.list_models(module=module)
    small = [name for name in models if name.startswith("test_")]
    run_timm_tests(timm_tests, tmp_path, [*small, min(set(models) - set(small), key=size)])
