"""Image classification: data and the training loop."""
