"""`python -m zoo.recipes.predict`, also under torchrun: the command `zoo-predict`, from `zoo.recipes.commands`."""

from zoo.recipes.commands.predict import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
