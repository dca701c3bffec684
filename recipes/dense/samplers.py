"""The batches of training, in an order that a resumed run continues, with seeds of their own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from mmdet.datasets.samplers import AspectRatioBatchSampler
from mmdet.registry import DATA_SAMPLERS
from mmengine.registry import DATA_SAMPLERS as ROOT
from torch.utils.data import BatchSampler, Dataset, Sampler

from zoo.recipes import distributed
from zoo.recipes.seeding import seed_cpu


class Batch(NamedTuple):
    """The indices of the images of a batch, and what seeds the random numbers of their transforms."""

    indices: list[int]
    seeds: tuple[int, ...]


def load(dataset: Dataset, batch: Batch) -> list[Any]:
    """The items of a batch. They do not depend on the process that loads them, or on what it has loaded before."""
    seed_cpu(*batch.seeds)
    return [dataset[index] for index in batch.indices]


@ROOT.register_module()
class SeededBatchSampler(Sampler[Batch]):
    """The batches of another batch sampler with their seeds: that of the run, the update, the process and the part.

    Args:
        sampler: Yields the indices of images.
        batch_size: Images in a batch.
        seed: The seed of the run.
        accumulate: Batches, or parts, of an update.
        batches: The configuration of the other batch sampler; torch's BatchSampler if None.
        drop_last: Whether torch's BatchSampler leaves out a last batch that is not full.
    """

    def __init__(
        self,
        sampler: Sampler[int],
        batch_size: int,
        seed: int,
        accumulate: int,
        batches: dict[str, Any] | None = None,
        drop_last: bool = False,
    ):
        given = {"sampler": sampler, "batch_size": batch_size}
        self.sampler = sampler  # MMEngine tells it the epoch
        plain = BatchSampler(sampler, batch_size, drop_last)
        self.batches = ROOT.build(batches, default_args=given) if batches else plain
        self.seed, self.accumulate = seed, accumulate
        self.number = self.skipped = 0

    def __len__(self) -> int:
        return len(self.batches)

    def skip(self, batches: int) -> None:
        """Leave out this number of batches at the start, without loading their images."""
        self.number = self.skipped = batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches. If they end, those of the next iteration are numbered on."""
        skipped, self.skipped = self.skipped, 0
        for indices in itertools.islice(self.batches, skipped, None):
            update, part = divmod(self.number, self.accumulate)
            self.number += 1
            yield Batch(indices, (self.seed, update, distributed.rank(), part))


@DATA_SAMPLERS.register_module()
class OrientedBatchSampler(AspectRatioBatchSampler):
    """mmdet's AspectRatioBatchSampler, whose batches have images that are all higher than wide, or none.

    A landscape padded to the size of a portrait is mostly padding.
    """

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of the images of each batch."""
        upright: dict[int, bool] = {}  # the data set unpickles what it knows about an image each time
        waiting: dict[bool, list[int]] = {True: [], False: []}
        for index in self.sampler:
            if index not in upright:
                image = self.sampler.dataset.get_data_info(index)
                upright[index] = image["width"] < image["height"]
            batch = waiting[upright[index]]
            batch.append(index)
            if len(batch) == self.batch_size:
                yield batch
                waiting[upright[index]] = []
        if not self.drop_last:  # only a sampler that ends leaves some
            yield from (batch for batch in waiting.values() if batch)
