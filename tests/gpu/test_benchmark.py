"""zoo-bench models on a GPU, where models run the Triton kernels. A minute; skipped without a GPU."""

import json

import pytest
import torch

from zoo.tools import benchmark

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _gpu():
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU here")


def test_models_in_half_precision(tmp_path):
    file, models = tmp_path / "out.json", ["test_dinat", "test_cswin", "test_biformer"]
    modes = ["--device", "cuda", "--dtype", "float16", "--cast", "--batch-size", "2", "--size", "64"]
    limits = ["--against", "test_resnet", "--seconds", "0.1", "--rounds", "2", "--json", str(file)]
    benchmark.main(["models", *models, *modes, *limits])
    content = json.loads(file.read_text())
    assert len(content["models"]) == 2 * 4
    for entry in content["models"]:
        for what in ("inference", "training"):
            assert entry[what]["status"] == "timed", (entry["name"], entry[what]["reason"])
            assert entry[what]["peak_bytes"] > 0
            assert entry[what]["matmul_share"]["median"] > 0
