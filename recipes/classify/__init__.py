"""Image classification with timm's data sets, optimizers and training task."""


def prepare(task: str) -> None:
    """Make this package ready for `task`: classification needs nothing."""
