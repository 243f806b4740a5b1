"""Experiments: a grid of configs and seeds, run, measured and compared; one file of `conf/experiments` each."""
