"""Encoders → scores: embed every clip of a task once, fit probes, say what the difference to another encoder is worth.

In: an encoder and task files. Out: `Scores`: means, deviations over seeds, intervals over groups of test clips, and the record that
paired tests need. Next: `report`. Shape letters beyond the house's (B clips, T frames, D width): C classes, P penalties, R rank of
the features, G groups.
"""
