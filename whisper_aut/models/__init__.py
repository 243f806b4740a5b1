"""The packed Whisper encoder, decoders, losses, and the LightningModule that trains them."""
