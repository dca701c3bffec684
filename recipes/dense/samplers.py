"""The batches of detection: images of one orientation, in an order that a resumed run continues."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from mmdet.datasets.samplers import AspectRatioBatchSampler
from mmdet.registry import DATA_SAMPLERS


@DATA_SAMPLERS.register_module()
class OrientedBatchSampler(AspectRatioBatchSampler):
    """mmdet's AspectRatioBatchSampler, whose batches have images that are all higher than wide, or none.

    A landscape padded to the size of a portrait is mostly padding. `skip` leaves batches out without loading them,
    while MMEngine would load the images of mmdet's sampler.
    """

    skipped = 0

    def skip(self, batches: int) -> None:
        """Leave out this number of batches at the start."""
        self.skipped = batches

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of the images of each batch."""
        return itertools.islice(self._batches(), self.skipped, None)

    def _batches(self) -> Iterator[list[int]]:
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
