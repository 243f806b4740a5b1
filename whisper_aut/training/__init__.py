"""Training: builders, optimizer, strategies, callbacks, and the training run itself."""

from whisper_aut.errors import require

require("lightning", "omegaconf", "torchmetrics")
