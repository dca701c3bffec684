"""`python -m zoo.recipes.train`, also under torchrun: the command `zoo-train`, from `zoo.recipes.commands`."""

from zoo.recipes.commands.train import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
