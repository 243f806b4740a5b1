"""Report scores and training logs as tables, PNG charts, and an HTML page."""
