"""Trains models in two processes and in one, and writes the differences to a file.

    python tests/zoo/parallel.py RESULTS.json MODEL ...

Under each model's name: `ddp` and `fsdp`, the largest deviation of a gradient or weight (or what was raised), `moved`,
whether every shard has changed, and `training`, whether DDP steps in training mode gave finite gradients.
"""

import json
import sys
from copy import deepcopy
from datetime import timedelta

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from zoo.recipes.classify.train_state import shard

PROCESSES, STEPS = 2, 2


def gradients(model, images):
    model.zero_grad()
    model(images).square().mean().backward()
    return {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}


def train(model, images):
    """SGD; the gradients of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for step in range(STEPS):
        seen.append({name: grad.clone() for name, grad in gradients(model, images[step]).items()})
        optimizer.step()
    return seen


def deviation(got, want):
    """The largest difference, in units of each tensor's largest value, or of 1e-4 of that of all tensors if it is less.

    A bias that a norm or a softmax ignores has a gradient of rounding errors, whose size is that of what is summed.
    """
    assert got.keys() == want.keys()
    largest = {name: tensor.abs().max().item() for name, tensor in want.items()}
    least = 1e-4 * max(largest.values())
    return max((got[name] - want[name]).abs().max().item() / max(largest[name], least) for name in want)


def compare(name, rank):
    torch.manual_seed(0)
    # In float64 the order of sums does not matter, in eval mode batch norm does not depend on the batch.
    model = timm.create_model(name, num_classes=10, dtype=torch.float64).eval()
    images = torch.randn(STEPS, 2 * PROCESSES, 3, 64, 64, dtype=torch.float64)
    own = images[:, rank::PROCESSES]

    alone = deepcopy(model)
    want = train(alone, images)

    ddp = DistributedDataParallel(deepcopy(model), find_unused_parameters=False)
    steps = zip(train(ddp, own), want, strict=True)
    result = {"ddp": max(deviation(got, expected) for got, expected in steps)}
    seen = train(ddp.train(), own)
    result["training"] = all(grad.isfinite().all().item() for grads in seen for grad in grads.values())

    sharded = deepcopy(model)
    shard(sharded)
    train(sharded, own)
    got = {key: parameter.full_tensor().detach() for key, parameter in sharded.named_parameters()}
    result["fsdp"] = deviation(got, {key: parameter.detach() for key, parameter in alone.named_parameters()})
    # A step by less than the last digit of a weight leaves it as it was.
    large = {key for key, parameter in alone.named_parameters() if parameter.grad.abs().max() > 1e-14}
    moved = {key for key, parameter in model.named_parameters() if not torch.equal(got[key], parameter)}
    result["moved"] = large <= moved
    return result


def work(rank, names, store, path):
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=600)
    )
    results = {}
    for name in names:
        try:
            results[name] = compare(name, rank)
        except Exception as error:
            results[name] = {"ddp": repr(error), "fsdp": repr(error)}
    if rank == 0:
        with open(path, "w") as file:
            json.dump(results, file)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    target, *models = sys.argv[1:]
    mp.start_processes(work, (models, f"{target}.store", target), nprocs=PROCESSES, start_method="fork")
