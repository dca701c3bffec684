"""Command-line tools around the zoo. None has moved in yet."""
