"""Sample → example: decode, features, tokens.

In: a `Sample` as it lies in a shard. Out: an `Example` ready to be packed, or a `Refusal`. Next: `data.stream` collects a batch of
them. Where features are made on the device, an example holds its waveform and `data.features` does the rest. Runs in the data
workers; picklable.
"""

from dataclasses import dataclass

from whisper_aut.corpora.audio import ClipLimits
from whisper_aut.data.augment import Augment
from whisper_aut.data.logmel import LogMel, mel_frames
from whisper_aut.data.pack import Example
from whisper_aut.data.sample import Refusal, Sample
from whisper_aut.data.text import TextCodec
from whisper_aut.data.waveform import load_waveform
from whisper_aut.errors import SampleRefused


@dataclass
class ExampleBuilder:
    """Turns samples into examples for one decoder.

    Args:
        logmel: the features of the encoder.
        codec: the tokens of the decoder.
        limits: what clips are taken.
        augment: what is done to them; None for validation.
        on_device: leave the log-mel, and its masks, to `data.features`.
    """

    logmel: LogMel
    codec: TextCodec
    limits: ClipLimits
    augment: Augment | None = None
    on_device: bool = False

    def __call__(self, sample: Sample, domain: str, position: int) -> Example | Refusal:
        """Build one example.

        Args:
            domain: the source's, for samples that do not say their own.
            position: of the sample in the order of the run; what is drawn for it is drawn by this.
        """
        domain = sample.annotation.domain or domain
        try:
            target = self.codec.encode(
                sample.annotation, domain, position
            )  # first: it is cheap, and decoding is not
            waveform = load_waveform(sample.audio, self.limits)
        except SampleRefused as refused:
            return Refusal(sample.shard, sample.key, refused.reason, refused.detail)
        if self.augment:
            waveform = self.augment.waveform(waveform, position)
        audio = waveform if self.on_device else self.logmel(waveform)
        if self.augment and not self.on_device:
            audio = self.augment.mel(audio, mel_frames(len(waveform)), position)
        return Example(
            audio=audio,
            mel_length=mel_frames(len(waveform)),
            target=target,
            domain=domain,
            key=sample.key,
            source=sample.shard.rsplit("/", 1)[0],
            position=position if self.augment else None,
        )
