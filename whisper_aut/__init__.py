"""Train universal audio encoders for speech, sound and music from Whisper."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whisper_aut.inference.encoder import AudioEncoder, load_encoder

__version__ = "1.0.0"
__all__ = ["AudioEncoder", "__version__", "load_encoder"]


def __getattr__(name: str) -> Any:
    # PyTorch and transformers take seconds to import. Importing them on first use keeps
    # `whisper-aut --help` fast.
    if name in ("AudioEncoder", "load_encoder"):
        from whisper_aut.inference import encoder

        return getattr(encoder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
