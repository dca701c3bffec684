"""Training recipes: Hydra configurations and the tasks behind `zoo-train` and `zoo-eval`."""

from zoo.extras import require_for_commands

require_for_commands(__name__)
