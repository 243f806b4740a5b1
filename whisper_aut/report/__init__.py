"""Report scores and training logs as tables, PNG charts, and an HTML page."""

from whisper_aut.errors import require

require("matplotlib")
