"""Callbacks of a run: checkpoints, metrics, the ledger, validation samples, clean stops."""
