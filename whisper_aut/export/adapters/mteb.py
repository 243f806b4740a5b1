"""Run an encoder in MTEB, which includes MAEB: `mteb.evaluate(mteb_model("DIR"), tasks)`.

Each clip becomes one vector, pooled over the clip's own frames. Clips over 30 s are encoded in
windows; MTEB's own Whisper wrapper truncates them.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from whisper_aut.audio.decode import SAMPLE_RATE_HZ
from whisper_aut.errors import UserError, require
from whisper_aut.inference.encoder import load_encoder
from whisper_aut.models.encoder import Padding

if TYPE_CHECKING:
    from whisper_aut.inference.encoder import AudioEncoder


def mteb_model(
    path: str,
    *,
    padding: Padding | None = None,
    pooling: str = "mean",
    device: str = "cpu",
    name: str = "",
) -> Any:
    """Return an encoder as a model for `mteb.evaluate`.

    Args:
        path: A directory, a run, or a hub id.
        padding: The padding mode, as for `load_encoder`.
        pooling: How frames become one vector, as for `AudioEncoder.embed`.
        device: The device to run on.
        name: The name under which MTEB stores results, as `org/name`. Defaults to one made from
            the encoder's fingerprint.

    Raises:
        UserError: If MTEB is not installed, or if there is no encoder at the path.
    """
    require("mteb")
    from mteb.models import ModelMeta  # pyright: ignore[reportMissingImports]
    from mteb.models.abs_encoder import AbsEncoder  # pyright: ignore[reportMissingImports]

    encoder = load_encoder(path, padding=padding, device=device)
    metadata: dict[str, Any] = {
        "name": name or f"whisper-aut/{encoder.fingerprint()}",
        # MTEB stores results by name and revision, so different weights need different revisions.
        "revision": encoder.fingerprint(),
        "embed_dim": encoder.width * (2 if pooling == "mean_std" else 1),
        "modalities": ["audio"],
        "framework": ["PyTorch"],
    }

    # MTEB's base class provides the similarities. The class is defined here because the base
    # class can only be imported where MTEB is installed.
    class WhisperAut(AbsEncoder):
        mteb_model_meta = ModelMeta.create_empty(overwrites=metadata)

        def __init__(self) -> None:
            self.model = encoder

        def encode(self, inputs: Any, **_: Any) -> np.ndarray:
            """Embed the clips of an MTEB data loader as `[B, D']`; task and split are ignored."""
            return embed_loader(encoder, inputs, pooling)

    return WhisperAut()


def embed_loader(encoder: "AudioEncoder", inputs: Any, pooling: str = "mean") -> np.ndarray:
    """Embed all clips of an MTEB data loader.

    Returns:
        float32 `[B, D']`, where D' is D, or 2 D for the pooling `mean_std`.

    Raises:
        UserError: If the task has no audio.
    """
    from mteb.models.modality_collators import AudioCollator  # pyright: ignore[reportMissingImports]

    inputs.collate_fn = AudioCollator(target_sampling_rate=SAMPLE_RATE_HZ)
    rows = []
    for batch in inputs:
        if "audio" not in batch:
            raise UserError(f"The encoder takes audio, but the task has only {', '.join(batch)}.")
        clips = [np.asarray(audio["array"], dtype=np.float32) for audio in batch["audio"]]
        rows.append(encoder.embed(clips, SAMPLE_RATE_HZ, pooling=pooling).numpy())
    return np.concatenate(rows)
