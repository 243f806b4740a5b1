"""Experiments: train and measure a grid of configs and seeds, and compare the arms."""
