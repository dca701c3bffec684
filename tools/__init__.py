"""Command-line tools around the zoo."""

from zoo.extras import require_for_commands

require_for_commands(__name__, ["matplotlib", "rich"])
