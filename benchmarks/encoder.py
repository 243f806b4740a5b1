"""Forward and backward of a whisper-tiny encoder against transformers' `WhisperEncoder` on clips padded to 30 s.

Features are made beforehand on both sides. In `30s` mode both encoders' frames are equal; what is timed is `none` mode, where a
clip costs its own length.
"""

import copy
from collections.abc import Iterator

import torch
from pairs import Row, compare, main
from recipes import Clips, whisper_tiny
from torch.testing import assert_close
from transformers import WhisperFeatureExtractor

from whisper_aut.data.logmel import LogMel, mel_frames
from whisper_aut.model.encoder import PackedEncoder
from whisper_aut.training.faults import find_compiler

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
        if find_compiler():
            compiled = PackedEncoder(whisper, "none", compile=True).train()
            assert_close(
                compiled(mel, lengths).values, ours(mel, lengths).values, atol=1e-5, rtol=0
            )
            yield compare(
                f"{case}, compiled",
                lambda compiled=compiled, mel=mel, lengths=lengths: (
                    compiled(mel, lengths).values.square().mean().backward()
                ),
                lambda ours=ours, mel=mel, lengths=lengths: (
                    ours(mel, lengths).values.square().mean().backward()
                ),
                against="ours without torch.compile",
                runs=runs,
                steps=True,
            )


if __name__ == "__main__":
    main(cases, "Encoder forward + backward, whisper-tiny shape")
