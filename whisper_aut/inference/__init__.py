"""Inference: embed, search and chat with a trained encoder."""
