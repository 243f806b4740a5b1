"""The encoder, the decoders that teach it, and the LightningModule that binds one of each."""
