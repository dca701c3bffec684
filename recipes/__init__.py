"""Training recipes: Hydra configurations and the tasks behind `zoo-train` and `zoo-eval`."""
