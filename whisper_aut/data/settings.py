"""The `data` group of a config: sources, mixture, batches and limits."""

from dataclasses import field
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic.dataclasses import dataclass

from whisper_aut.audio.augment import AugmentSettings
from whisper_aut.audio.decode import LongClips
from whisper_aut.data.annotation import DOMAIN_NAME, Template
from whisper_aut.data.filters import check_allowed_licence
from whisper_aut.errors import nearest
from whisper_aut.schema import STRICT, Text


def _check_domain(name: str) -> str:
    if not DOMAIN_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a name in lower case, such as speech or bioacoustics")
    return name


def _check_template(text: str) -> str:
    template = Template(text if "{" in text else f"{{{text}}}")  # or the name of a field
    if text and (fault := template.fault):
        raise ValueError(f"{text!r} is not a template: {fault}. Write {{field}} or {{field:words}}")
    return text


TextTemplate = Annotated[Text, AfterValidator(_check_template)]
Licence = Annotated[str, AfterValidator(check_allowed_licence)]
Fraction = Annotated[float, Field(ge=0, le=1)]
ClipSeconds = Annotated[float, Field(gt=0, le=30)]
Domain = Annotated[str, AfterValidator(_check_domain)]
# Fields that a source may take from others; licences and durations are those of the index.
SampleField = Literal[
    "text", "label", "domain", "task", "language", "instruction", "answer", "source", "id",
    "segments",
]  # fmt: skip


@dataclass(config=STRICT)
class SourceSettings:
    """A folder or URL of shards, its domain, and its sampling weight among sources of that domain.

    All sources of a domain have a weight, or none has and each counts by its clips.

    Attributes:
        fields: where the annotation of a sample is read from, if not from fields of the usual
            names: the name of a JSON field, or a template over fields such as
            `{title}, played by {artist}`. `__key__` is the sample's key, and `txt` and `cls` are
            its members of these names. An empty name ignores a field.
        text: short for `fields: {text: …}`.
        task: replaces the `task` of all samples. It selects their instruction.
        annotations: a JSON Lines or parquet file whose rows add to the fields of the sample with
            their `id`, or replace them.
    """

    path: Text
    domain: Domain
    weight: PositiveFloat | None = None
    licence: Text = ""
    text: TextTemplate = ""
    task: Text = ""
    fields: dict[SampleField, TextTemplate] = field(default_factory=dict)
    annotations: Text = ""

    @model_validator(mode="after")
    def check_text(self) -> Self:
        if self.text and "text" in self.fields:
            raise ValueError("text: fields.text is given too; remove one of them")
        return self


@dataclass(config=STRICT)
class LicenceSettings:
    """Allowed licences of clips by SPDX id: `CC-BY-4.0`, or `CC-BY` for all its versions.

    An empty list allows all clips. Otherwise, clips with an unknown licence are excluded too. A
    clip without a licence of its own has that of its source.
    """

    allow: list[Licence] = field(default_factory=list)


@dataclass(config=STRICT)
class MixtureChange:
    """New weights of `domains` after a number of training clips over all ranks.

    Domains that are missing keep their weight.
    """

    after_clips: PositiveInt
    domains: dict[Domain, NonNegativeFloat]


@dataclass(config=STRICT)
class DataSettings:
    """The data of a run.

    Attributes:
        root, shards: folders of the user's own corpora, and of shards that are built.
        mode: `mixture` samples endlessly by weight; `epochs` reads each clip once per epoch.
        domains: weight of each domain among the training clips; any positive sum. All domains of
            the sources and their samples are named here; others than the three may be added.
        schedule: changes of these weights during training, in order.
        weigh_by: whether sources without a weight count by their clips or by their hours.
        temperature: weights are raised to 1 / temperature; above 1 makes them more even.
        batch_clips: clips per rank and micro-batch.
        batch_seconds: instead of `batch_clips`, maximum seconds of audio per rank and micro-batch;
            needs sample tables (`whisper-aut data index`).
        batch_tokens: next to `batch_seconds`, maximum tokens of the decoder per rank and
            micro-batch, as predicted from the lengths of texts.
        samples_per_epoch: clips per epoch over all ranks; null for the size of the training data.
        valid_clips: use only the first N clips of each validation source; null for all.
        window: clips of a training source that are shuffled together, over all partitions.
        partitions: parts of the training data that take turns. A multiple of ranks × workers lets
            each worker read its own parts of remote shards in sequence. Small data has fewer.
        features: compute log-mels in the workers or on the training device.
        min_seconds, max_seconds: shorter clips are skipped, and longer ones as `long_clips` says.
        long_clips: `trim` cuts off up to half a second and skips longer clips. `crop` takes a
            window of those without a transcript, and `chunk` consecutive `segments` of those that
            have some. `skip` skips all.
        exclude: list of clips to exclude from training, as `whisper-aut data audit` writes it.
        max_skipped_fraction: limit per source, over all ranks and resumes; above it the run stops.
        retries: attempts after a failed read of a remote shard, with pauses that double.
        timeout_seconds: a remote read fails after this long without data.
    """

    root: Text = "data"
    shards: Text = "data"
    train: list[SourceSettings] = field(default_factory=list)
    valid: list[SourceSettings] = field(default_factory=list)
    mode: Literal["mixture", "epochs"] = "mixture"
    domains: dict[Domain, NonNegativeFloat] = field(
        default_factory=lambda: {"speech": 0.8, "sound": 0.1, "music": 0.1}
    )
    schedule: list[MixtureChange] = field(default_factory=list)
    weigh_by: Literal["clips", "hours"] = "clips"
    temperature: PositiveFloat = 1.0
    batch_clips: PositiveInt = 16
    batch_seconds: PositiveFloat | None = None
    batch_tokens: PositiveInt | None = None
    samples_per_epoch: PositiveInt | None = None
    valid_clips: PositiveInt | None = None
    window: PositiveInt = 1000
    partitions: PositiveInt = 64
    workers: NonNegativeInt = 2
    features: Literal["workers", "device"] = "workers"
    min_seconds: ClipSeconds = 0.1
    max_seconds: ClipSeconds = 30.0
    long_clips: LongClips = "trim"
    exclude: Text = ""
    licences: LicenceSettings = field(default_factory=LicenceSettings)
    max_skipped_fraction: Fraction = 0.05
    retries: NonNegativeInt = 6
    timeout_seconds: PositiveFloat = 30.0
    augment: AugmentSettings = field(default_factory=AugmentSettings)

    @property
    def mixtures(self) -> list[tuple[int, dict[str, float]]]:
        """The weights of domains, each with the number of training clips before them."""
        found = [(0, {**self.domains})]
        for change in self.schedule:
            found.append((change.after_clips, found[-1][1] | change.domains))
        return found

    @model_validator(mode="after")
    def check(self) -> Self:
        problems = []
        starts = [start for start, _ in self.mixtures]
        if starts != sorted(set(starts)):
            problems.append("schedule: after_clips must increase from entry to entry")
        if self.schedule and self.mode == "epochs":
            problems.append("schedule: must be empty with mode=epochs, which ignores weights")
        if not all(sum(domains.values()) > 0 for _, domains in self.mixtures):
            problems.append("domains: at least one weight must be positive, also in `schedule`")
        named = {source.domain for source in (*self.train, *self.valid)}
        for domain in sorted((named | self.mixtures[-1][1].keys()) - self.domains.keys()):
            problems.append(
                f"domains: has no weight for {domain!r}, the domain of a source or of `schedule`."
                f"{nearest(domain, self.domains)}"
            )
        weights = self.mixtures[-1][1].keys()
        for domain in weights:
            sources = [source for source in self.train if source.domain == domain]
            if not sources and any(domains.get(domain, 0) > 0 for _, domains in self.mixtures):
                problems.append(f"domains.{domain}: has a weight but no source in data.train")
            without = [source.path for source in sources if source.weight is None]
            if 0 < len(without) < len(sources):
                problems.append(
                    f"train: some {domain} sources have a weight, but not {', '.join(without)}. "
                    "Give one to all sources of a domain, or to none: then each counts by its clips"
                )
        longest = f"max_seconds, which is {self.max_seconds:g}"
        if self.min_seconds > self.max_seconds:
            problems.append(f"min_seconds: must be at most {longest}, got {self.min_seconds:g}")
        if self.batch_seconds is not None and self.batch_seconds < self.max_seconds:
            problems.append(f"batch_seconds: {self.batch_seconds:g} is below {longest}")
        if self.batch_tokens and not self.batch_seconds:
            problems.append("batch_tokens: needs batch_seconds")
        if self.mode == "epochs" and self.samples_per_epoch is not None:
            problems.append("samples_per_epoch: must be null with mode=epochs (every clip once)")
        if problems:
            raise ValueError("\n".join(problems))
        return self
