"""Scores and logs → what people read: tables for the terminal, Markdown and CSV, and charts as PNG."""
