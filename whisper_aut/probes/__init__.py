"""Probe frozen encoders: embed every clip of a task once, fit probes, and compare encoders with
confidence intervals and paired tests.

Shapes in this package: B clips, T encoder frames, D width, C classes, I items (clips or
segments), J problems fitted together, P parameters of a problem, R rank of the features, G
groups, U units of a record.
"""
