"""The commands `zoo-train`, `zoo-eval` and `zoo-predict`: their help, their arguments, and the call of the task."""
