"""From shards to batches: what is read, in which order, checked how, and packed into which tensors."""
