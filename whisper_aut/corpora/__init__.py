"""Make shards from audio and text: public corpora, manifests and synthetic corpora."""
