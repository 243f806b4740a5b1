"""The data pipeline from shards to batches: reading, order, checks, and packing into tensors."""
