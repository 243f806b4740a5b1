"""An encoder as an audio model of MTEB, which MAEB is a part of: one pooled vector a clip.

In: MTEB's batches of audio. Out: `[B, D']` float32. Next: `mteb.evaluate(mteb_model("DIR"), tasks)`. Pooling is over each
clip's own frames; clips over 30 s are heard in windows, where MTEB's own Whisper wrapper cuts them off.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from whisper_aut.audio.decode import SAMPLE_RATE_HZ
from whisper_aut.errors import UserError
from whisper_aut.models.encoder import Padding
from whisper_aut.models.pretrained import load_encoder

if TYPE_CHECKING:
    from whisper_aut.models.pretrained import AudioEncoder


def mteb_model(
    path: str,
    *,
    padding: Padding | None = None,
    pooling: str = "mean",
    device: str = "cpu",
    name: str = "",
) -> "Any":
    """Return an object that `mteb.evaluate` takes.

    Args:
        path: a directory, a run, or a hub id.
        padding: as for `load_encoder`.
        name: under which MTEB keeps results, as `org/name`.

    Raises:
        UserError: MTEB is not installed, or there is no encoder.
    """
    try:
        from mteb.models import ModelMeta  # pyright: ignore[reportMissingImports]
        from mteb.models.abs_encoder import AbsEncoder  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError("This adapter is MTEB's client: pip install 'whisper-aut[mteb]'.") from None
    encoder = load_encoder(path, padding=padding, device=device)
    facts: dict[str, Any] = {
        "name": name or f"whisper-aut/{encoder.fingerprint()}",
        "revision": encoder.fingerprint(),  # results are kept by name and revision: other weights are other results
        "embed_dim": encoder.width * (2 if pooling == "mean_std" else 1),
        "modalities": ["audio"],
        "framework": ["PyTorch"],
    }

    # MTEB's own base class brings similarities; it can only be named where MTEB is there.
    class WhisperAut(AbsEncoder):
        mteb_model_meta = ModelMeta.create_empty(overwrites=facts)

        def __init__(self) -> None:
            self.model = encoder

        def encode(self, inputs: Any, **_: Any) -> np.ndarray:
            """Return `[B, D']` of MTEB's loader of audio; what else it tells of task and split changes nothing."""
            return embed_loader(encoder, inputs, pooling)

    return WhisperAut()


def embed_loader(encoder: "AudioEncoder", inputs: Any, pooling: str = "mean") -> np.ndarray:
    """Embed what one of MTEB's data loaders holds: `[B, D']`.

    Raises:
        UserError: the task has no audio.
    """
    from mteb.models.modality_collators import AudioCollator  # pyright: ignore[reportMissingImports]

    inputs.collate_fn = AudioCollator(target_sampling_rate=SAMPLE_RATE_HZ)
    rows = []
    for batch in inputs:
        if "audio" not in batch:
            raise UserError(f"This encoder takes audio; the task has {', '.join(batch)}.")
        clips = [np.asarray(audio["array"], dtype=np.float32) for audio in batch["audio"]]
        rows.append(encoder.embed(clips, SAMPLE_RATE_HZ, pooling=pooling).numpy())
    return np.concatenate(rows)
