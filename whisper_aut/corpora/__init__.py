"""Audio and text, wherever they come from, made into shards: the demo corpus, manifests, and the format itself."""
