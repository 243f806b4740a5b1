"""Forward and backward of a whisper-tiny encoder against transformers' `WhisperEncoder` on clips
padded to 30 s.

Features are made beforehand on both sides. In `30s` mode both encoders' frames are equal; what is
timed is `none` mode, where a clip costs its own length. `pad to longest` compares with the layers
of `WhisperEncoder` on a batch that is padded to its longest clip and no further: what a careful
user would write around Hugging Face's length check. It changes the frames of shorter clips.
"""

import copy
from collections.abc import Iterator

import torch
from pairs import Row, compare, main
from recipes import Clips, whisper_tiny
from torch import Tensor
from torch.nn.functional import gelu
from torch.testing import assert_close
from transformers import WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from whisper_aut.audio.logmel import LogMel, mel_frames
from whisper_aut.models.encoder import PackedEncoder

CASES_SECONDS = {
    "5 s": [5.0] * 8,
    "1-10 s": [1.0, 2.3, 3.6, 4.9, 6.1, 7.4, 8.7, 10.0],
    "30 s": [30.0] * 4,
}


def cases(runs: int) -> Iterator[Row]:
    whisper = whisper_tiny().model.encoder
    theirs = copy.deepcopy(whisper)
    logmel, extractor = LogMel(80), WhisperFeatureExtractor(feature_size=80)
    for case, seconds in CASES_SECONDS.items():
        waveforms = Clips.noise(seconds, 1).waveforms
        mel, lengths = (
            torch.cat([logmel(clip) for clip in waveforms]),
            [mel_frames(len(clip)) for clip in waveforms],
        )
        features = extractor(
            [clip.numpy() for clip in waveforms], sampling_rate=16_000, return_tensors="pt"
        ).input_features
        with torch.no_grad():
            frames = PackedEncoder(whisper, "30s")(mel, lengths).values
            expected = theirs(features).last_hidden_state
            assert_close(frames.view_as(expected), expected, atol=1e-5, rtol=0)
        ours = PackedEncoder(whisper, "none").train()
        yield compare(
            f"{case}, {len(seconds)} clips",
            lambda ours=ours, mel=mel, lengths=lengths: (
                ours(mel, lengths).values.square().mean().backward()
            ),
            lambda features=features: theirs(features).last_hidden_state.square().mean().backward(),
            against="transformers.WhisperEncoder, clips padded to 30 s",
            runs=runs,
            steps=True,
        )
        if max(seconds) < 30:
            longest = features[..., : max(lengths)]
            yield compare(
                f"{case}, pad to longest",
                lambda ours=ours, mel=mel, lengths=lengths: (
                    ours(mel, lengths).values.square().mean().backward()
                ),
                lambda longest=longest: shortened(theirs, longest).square().mean().backward(),
                against="transformers.WhisperEncoder's layers, clips padded to the longest",
                runs=runs,
                steps=True,
            )


def shortened(encoder: WhisperEncoder, features: Tensor) -> Tensor:
    """Run a `WhisperEncoder` on features of any length, `[B, M, F]` → `[B, T, D]`, unmasked."""
    hidden = gelu(encoder.conv2(gelu(encoder.conv1(features)))).transpose(1, 2)
    hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
    for layer in encoder.layers:
        hidden = layer(hidden, None)
    return encoder.layer_norm(hidden)


if __name__ == "__main__":
    main(cases, "Encoder forward + backward, whisper-tiny shape")
