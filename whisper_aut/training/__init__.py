"""Training: builders, optimizer, strategies, callbacks, and the training run itself."""
