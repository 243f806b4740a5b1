"""Experiments: train and measure a grid of configs and seeds, and compare the arms."""

from whisper_aut.errors import require

require("lightning", "omegaconf")
