"""Log-mel features of a batch of clips against `transformers.WhisperFeatureExtractor`, one thread
each.

The extractor pads every clip to 30 s, which is what its users run; ours stops where the clip does.
`unpadded` tells it to stop at the longest clip, which a careful user of short clips would do. Both
compute float32.
"""

from collections.abc import Iterator

import torch
from pairs import Row, compare, main
from torch import Tensor
from torch.testing import assert_close
from transformers import WhisperFeatureExtractor

from whisper_aut.audio.logmel import LogMel

CLIPS = 8
CASES_SECONDS = (5, 30)
AGAINST = "WhisperFeatureExtractor, clips padded to 30 s"


def cases(runs: int) -> Iterator[Row]:
    logmel, extractor = LogMel(80), WhisperFeatureExtractor(feature_size=80)
    for seconds in CASES_SECONDS:
        generator = torch.Generator().manual_seed(seconds)
        waveforms = [torch.randn(16_000 * seconds, generator=generator) * 0.1 for _ in range(CLIPS)]
        arrays = [waveform.numpy() for waveform in waveforms]
        yield compare(
            f"{seconds} s",
            lambda waveforms=waveforms: [logmel(waveform) for waveform in waveforms],
            lambda arrays=arrays: (
                extractor(arrays, sampling_rate=16_000, return_tensors="pt").input_features
            ),
            against=AGAINST,
            check=same_frames,
            runs=4 * runs,  # a run takes milliseconds
        )
    arrays = [waveform.numpy()[: 5 * 16_000] for waveform in waveforms]
    clips = [torch.from_numpy(array) for array in arrays]
    yield compare(
        "5 s, unpadded",
        lambda: [logmel(clip) for clip in clips],
        lambda: (
            extractor(
                arrays, sampling_rate=16_000, padding="longest", return_tensors="pt"
            ).input_features
        ),
        against="WhisperFeatureExtractor, padding='longest'; the last frames of a clip differ",
        check=lambda ours, theirs: same_frames([clip[: 5 * 100 - 2] for clip in ours], theirs),
        runs=4 * runs,
    )


def same_frames(ours: list[Tensor], theirs: Tensor) -> None:
    for clip, reference in zip(ours, theirs, strict=True):
        assert_close(clip, reference.T[: len(clip)], atol=1e-5, rtol=0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(cases, "Log-mel features of 8 clips")
