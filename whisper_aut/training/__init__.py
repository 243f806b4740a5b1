"""From a config to trained weights: builders, optimiser, strategy, callbacks, and the run itself."""
