"""The commands `zoo-train`, `-eval`, `-predict` and `-embed`: their help, their arguments, and the call of the task."""
