"""The demo corpus: captioned speech, sound and music, synthesised from a seed."""
