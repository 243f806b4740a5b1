"""Probe frozen encoders: embed every clip of a task once, train probes, and compare encoders with
confidence intervals and paired tests.

Shapes in this package: B clips, T encoder frames, D width, C classes, I items (clips or
segments), J heads trained together, P parameters of a head, R rank of the features, G groups, U
units of a record.
"""

from whisper_aut.errors import require

require("lightning", "omegaconf", "torchmetrics")
