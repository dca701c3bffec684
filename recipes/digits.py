"""The handwritten digits of scikit-learn as images: the data set of the demo."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torch.utils.data import Dataset


class Digits(Dataset):
    """The 1,797 handwritten digits of scikit-learn, 8x8 pixels, as RGB images of 32x32.

    Args:
        training: Whether to load the 1,437 images for training or the other 360. The split is fixed and stratified.
    """

    classes = tuple("0123456789")

    def __init__(self, training: bool):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, targets = load_digits(return_X_y=True)
        parts = train_test_split(images, targets, test_size=360, random_state=0, stratify=targets)
        images, self.targets = (parts[0], parts[2]) if training else (parts[1], parts[3])
        images = (images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        # Crops are cut at whole pixels, and eight pixels are too few for that.
        self.images = [Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC) for image in images]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index].convert("RGB"), int(self.targets[index])
