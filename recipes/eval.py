"""`python -m zoo.recipes.eval`, also under torchrun: the command `zoo-eval`, from `zoo.recipes.commands`."""

from zoo.recipes.commands.eval import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
