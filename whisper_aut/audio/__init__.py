"""Audio: bytes to mono 16 kHz waveforms, log-mels, windows of long clips."""
