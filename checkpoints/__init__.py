"""The manifest of known checkpoints, `manifest.json`, as package data; `zoo.checkpoints` reads it."""
