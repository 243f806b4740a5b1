"""Make shards from audio and text: public corpora, manifests and synthetic corpora."""

from whisper_aut.errors import require

require("webdataset", "braceexpand")
