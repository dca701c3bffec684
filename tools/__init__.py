"""Command-line tools around the zoo."""
