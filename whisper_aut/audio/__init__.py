"""Audio: decoding to mono 16 kHz waveforms, log-mel features, windows of long clips."""
