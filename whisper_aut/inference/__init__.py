"""Use trained runs: embed clips, search among them, and ask the decoder questions."""
