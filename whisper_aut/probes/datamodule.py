"""A LightningDataModule of the cached embeddings of a split, for each kind of answer.

The items of a split are clips, or their segments: those of the pool (training and validation
clips), followed by those of the test part. J heads of a probe are trained at once, each on items
of its own, so every batch ends with a mask `[b, J]` of the items of each head.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from math import ceil, floor
from typing import TYPE_CHECKING, Any, NamedTuple

import jiwer
import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from whisper_aut.probes.embed import Embeddings
from whisper_aut.probes.metrics import ANSWERS, Answer, class_metric, recall_credit
from whisper_aut.probes.splits import Split, class_names, inner_folds
from whisper_aut.probes.stats import jackknife

if TYPE_CHECKING:
    from whisper_aut.probes.modules import Probe

MIN_BATCH_ITEMS, MIN_STEPS = 32, 16


class HeadResult(NamedTuple):
    """The score of one head on some items, and what it is computed from.

    Attributes:
        score: the metric of the task.
        loss: decides between settings of equal score.
        outputs: class scores `[n, C]`, cosines of clips and captions `[n, N]`, or texts.
        targets: classes `[n]`, targets `[n, C]`, clips of the captions `[N]`, or transcripts.
    """

    score: float
    loss: float
    outputs: Any
    targets: Any


class SplitResult(NamedTuple):
    """The score of a probe on the test clips of a split, and what it is computed from.

    Attributes:
        score: the score.
        units: `[U]`. If the score is a mean over clips, the contribution of each; otherwise the
            pseudo-values of groups of clips, see `jackknife`. Encoders are compared by these.
        predicted: per clip, the class, the classes, the events, the nearest caption or the
            transcript.
        probabilities: per clip, the probability of each predicted class. Empty if the probe
            gives none.
    """

    score: float
    units: np.ndarray
    predicted: tuple[Any, ...]
    probabilities: tuple[Any, ...] = ()


class Standardizer:
    """Standardises features by mean and deviation of the training items `[I, …, D]`."""

    def __init__(self, train: Tensor, others: Tensor):
        self.mean = train.mean(0)
        self.deviation = train.std(0, correction=0).clamp_min(1e-6)

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.deviation


class PrincipalAxes:
    """Maps features `[B, D]` to their standardised principal components `[B, R]`.

    Mean and deviation are those of the training items; other items (validation) only extend the
    span of the axes. The rotation changes neither the penalty nor the optimum of a linear probe,
    since L2 is invariant to rotations and optimal weights are in the span of the data. It makes
    the problem well conditioned, which saves four fifths of the L-BFGS steps.
    """

    def __init__(self, train: Tensor, others: Tensor):
        self.mean, deviation = train.mean(0), train.std(0, correction=0)
        # Constant features are not scaled.
        constant = deviation <= 1e-7 * self.mean.abs().clamp_min(1e-6)
        self.deviation = torch.where(constant, 1.0, deviation)
        rows = ((torch.cat([train, others]) - self.mean) / self.deviation).double()
        if len(rows) < rows.shape[1]:
            values, vectors = torch.linalg.eigh(rows @ rows.T)
            kept = values > values[-1] * 1e-9
            axes = rows.T @ (vectors[:, kept] / values[kept].sqrt())
        else:
            values, axes = torch.linalg.eigh(rows.T @ rows)
            kept = values > values[-1] * 1e-9
            axes = axes[:, kept]
        self.axes = axes.float()  # [D, R]
        self.variances = (values[kept] / len(rows)).float()  # [R]

    def __call__(self, features: Tensor) -> Tensor:
        return ((features - self.mean) / self.deviation) @ self.axes


class Frames:
    """Frames of many clips that stay in their cache files, and are read, standardised and padded
    per batch.

    Args:
        clips: memory-mapped frames `[T, D]`, as in `Embeddings.frames`.
        train: `[B]`, marks the clips used for mean and deviation.
    """

    def __init__(self, clips: Sequence[Tensor], train: np.ndarray):
        self.clips = clips
        self.lengths = torch.tensor([len(clip) for clip in clips])
        total = squares = torch.zeros(clips[0].shape[1], dtype=torch.double)
        for number in np.flatnonzero(train).tolist():
            clip = clips[number].double()
            total, squares = total + clip.sum(0), squares + clip.square().sum(0)
        count = int(self.lengths[torch.from_numpy(train)].sum())
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        self.mean, self.deviation = mean.float(), variance.sqrt().float().clamp_min(1e-6)

    @property
    def width(self) -> int:
        return len(self.mean)

    def __call__(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return the frames of some clips, padded to `[b, T, D]`, and their lengths `[b]`."""
        padded = pad_sequence([self.clips[i] for i in items.tolist()], batch_first=True)
        return (padded - self.mean) / self.deviation, self.lengths[items]


class EmbeddingsDataModule(LightningDataModule):
    """Base of the data modules: the items of a split, prepared for a kind of probe.

    At first there is a single head, trained on the training split and validated on the first of
    its `inner_folds`. `assign` sets other heads.

    Args:
        split: the split.
        probe: decides how features are prepared and how large batches are.
        metric: a key of `ANSWERS`; by default, the one of the class.
        owners: the clip of each item, `[I]`; by default, an item is a clip.
        device: where features in memory are kept. Frames stay in their files.
    """

    metric: str = "accuracy"

    def __init__(
        self,
        split: Split,
        probe: "type[Probe]",
        *,
        metric: str = "",
        owners: Tensor | None = None,
        device: str = "cpu",
    ):
        super().__init__()
        self.split, self.probe, self.device = split, probe, device
        self.metric = metric or self.metric
        pool, test = split.pool, split.test
        self.owners = torch.arange(len(pool) + len(test)) if owners is None else owners
        self.pool_items = int((self.owners < len(pool)).sum())
        fold = inner_folds(split, ANSWERS[self.metric])[0]
        self.assign([fold.train], [fold.valid])
        self.frames = self.transform = None
        if pool.frames:
            train = np.concatenate([split.train, np.zeros(len(test), dtype=bool)])
            self.frames = Frames([*pool.frames, *test.frames], train)
            return
        features = [pool.features, test.features]
        if probe.transform is not None:
            train = self.mask([split.train])[: self.pool_items, 0]
            self.transform = probe.transform(pool.features[train], pool.features[~train])
            features = [self.transform(part) for part in features]
        self.features = torch.cat(features).to(device)

    @property
    def width(self) -> int:
        """Size of a feature vector or frame, D or R."""
        return self.frames.width if self.frames else self.features.shape[-1]

    def assign(
        self, train: Sequence[np.ndarray], valid: Sequence[np.ndarray] = (), seed: int = 0
    ) -> None:
        """Set the clips of the pool that each head is trained on, and those that it is validated
        on, as masks `[B]`.

        The seed decides the order of batches, and whatever else is drawn in training.
        """
        self.train, self.seed = self.mask(train), seed
        self.valid = self.mask(valid) if len(valid) else None

    def mask(self, clips: Sequence[np.ndarray]) -> Tensor:
        """Convert masks over clips of the pool, each `[B]`, to a mask over items, `[I, J]`."""
        marked = torch.from_numpy(np.stack(clips, 1))
        mask = torch.zeros(len(self.owners), marked.shape[1], dtype=torch.bool)
        mask[: self.pool_items] = marked[self.owners[: self.pool_items]]
        return mask

    def train_dataloader(self) -> "HeadLoader":
        most = self.probe.batch_items
        if most is None:
            return HeadLoader(self, self.train)
        items = int(self.train.any(1).sum())
        return HeadLoader(self, self.train, batch_size(items, most), self.seed)

    def val_dataloader(self) -> "HeadLoader | list[Any]":
        if self.valid is None:
            return []
        return HeadLoader(self, self.valid, self.probe.valid_batch_items)

    def test_dataloader(self) -> "HeadLoader":
        tested = torch.arange(len(self.owners)) >= self.pool_items
        mask = tested[:, None].expand(-1, self.train.shape[1])
        return HeadLoader(self, mask, self.probe.valid_batch_items)


def batch_size(items: int, most: int) -> int:
    """Return the number of items per step: an epoch has at least `MIN_STEPS` steps, unless that
    would need fewer than `MIN_BATCH_ITEMS` items per step.
    """
    return min(most, max(MIN_BATCH_ITEMS, items // MIN_STEPS))


class HeadLoader:
    """Batches of a data module, each followed by the mask `[b, J]` of the heads.

    Args:
        data: its `batch` makes batches.
        mask: `[I, J]`, the items of each head. Only items of at least one head are loaded.
        batch_items: number of items per batch; None for one batch of all items.
        seed: shuffles the items in every epoch, and decides what is drawn. None for the given
            order.
    """

    def __init__(
        self, data: Any, mask: Tensor, batch_items: int | None = None, seed: int | None = None
    ):
        self.data, self.mask = data, mask.float()
        self.items = torch.nonzero(mask.any(1))[:, 0]
        self.batch_items = batch_items or len(self.items)
        self.order = self.draws = None
        if seed is not None:
            self.order, self.draws = (torch.Generator().manual_seed(seed) for _ in range(2))

    def __len__(self) -> int:
        return ceil(len(self.items) / self.batch_items)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        items = self.items
        if self.order is not None:
            items = items[torch.randperm(len(items), generator=self.order)]
        for chosen in items.split(self.batch_items):
            yield *self.data.batch(chosen, self.draws), self.mask[chosen]


class ClassDataModule(EmbeddingsDataModule):
    """Clips, or their segments, with one class or any number of classes each.

    Args:
        classes: the names of the classes; by default, those of the labels.
        segment_seconds: segment length, for tasks with events.
        options: see `EmbeddingsDataModule`.
    """

    def __init__(
        self,
        split: Split,
        probe: "type[Probe]",
        *,
        classes: Sequence[str] = (),
        segment_seconds: float = 0.0,
        **options: Any,
    ):
        self.answer = ANSWERS[options.get("metric") or self.metric]
        self.classes = tuple(classes or class_names([split], self.answer, "task"))
        self.outputs, self.segment_seconds = len(self.classes), segment_seconds
        lengths = (*split.pool.lengths, *split.test.lengths)
        if lengths:
            clips = torch.arange(len(lengths))
            options["owners"] = clips.repeat_interleave(torch.tensor(lengths))
        super().__init__(split, probe, **options)
        parts = (split.pool, split.test)
        targets = [class_targets(p, self.answer, self.classes, segment_seconds) for p in parts]
        self.targets = torch.cat(targets).to(self.device)

    def batch(self, items: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Return features `[b, …]`, or frames `[b, T, D]` and lengths `[b]`, then targets."""
        chosen = items.to(self.device)
        inputs = self.frames(items) if self.frames else (self.features[chosen],)
        return *inputs, self.targets[chosen]

    def result(self, head: HeadResult) -> SplitResult:
        """Return the result of a head on the test items."""
        scores, targets = head.outputs, head.targets
        if targets.ndim == 1:
            highest, predicted = scores.softmax(1).max(1)
            right = (predicted == targets).double().numpy()
            names = tuple(self.classes[code] for code in predicted.tolist())
            return SplitResult(head.score, right, names, tuple(_rounded(highest)))
        owners = self.owners[self.pool_items :] - len(self.split.pool)
        probabilities = scores.sigmoid()

        def score_of(clips: np.ndarray) -> float:
            own = torch.from_numpy(clips)[owners]
            return class_metric(self.metric, self.outputs, scores[own], targets[own])

        units = jackknife(score_of, self.split.test.group_numbers())
        if self.answer == "events":
            return SplitResult(head.score, units, self._events(probabilities, owners))
        marked = [torch.nonzero(row > 0.5)[:, 0] for row in probabilities]
        return SplitResult(
            head.score,
            units,
            tuple(tuple(self.classes[code] for code in codes.tolist()) for codes in marked),
            tuple(
                tuple(_rounded(row[codes]))
                for row, codes in zip(probabilities, marked, strict=True)
            ),
        )

    def _events(self, probabilities: Tensor, owners: Tensor) -> tuple[Any, ...]:
        """Return the events (start, end, class) of each clip: runs of segments with a probability
        above 0.5.
        """
        found = []
        for clip in range(len(self.split.test)):
            marks = (probabilities[owners == clip] > 0.5).int().numpy()
            edges = np.diff(np.pad(marks, ((1, 1), (0, 0))), axis=0)
            events = []
            for code, name in enumerate(self.classes):
                starts, ends = (np.flatnonzero(edges[:, code] == sign) for sign in (1, -1))
                for start, end in self.segment_seconds * np.stack([starts, ends], 1):
                    events.append((round(float(start), 3), round(float(end), 3), name))
            found.append(tuple(sorted(events)))
        return tuple(found)


def _rounded(probabilities: Tensor) -> list[float]:
    return [round(value, 4) for value in probabilities.tolist()]


def class_targets(
    part: Embeddings, answer: Answer, classes: Sequence[str], segment_seconds: float = 0.0
) -> Tensor:
    """Return classes `[I]`, or `[I, C]` of 0 and 1 if an item has any number of classes. Events
    are converted to the classes of each segment.
    """
    number = {name: code for code, name in enumerate(classes)}
    if answer == "class":
        return torch.tensor([number[label] for label in part.labels], dtype=torch.long)
    if answer == "classes":
        targets = torch.zeros(len(part), len(classes))
        for clip, names in enumerate(part.labels):
            targets[clip, [number[name] for name in names if name in number]] = 1.0
        return targets
    rolls = []
    for events, segments in zip(part.labels, part.lengths, strict=True):
        roll = torch.zeros(segments, len(classes))
        for start, end, name in (event for event in events if event[2] in number):
            # The tolerance of 1e-6 is for rounding: 0.3 / 0.1 is slightly below 3, and an event
            # that ends at a border does not overlap the next segment.
            first = floor(start / segment_seconds + 1e-6)
            last = max(ceil(end / segment_seconds - 1e-6), first + 1)
            roll[max(first, 0) : max(last, 0), number[name]] = 1.0
        rolls.append(roll)
    return torch.cat([torch.zeros(0, len(classes)), *rolls])


class CaptionDataModule(EmbeddingsDataModule):
    """Clips with one or more captions each, as bags of words.

    The bag of a caption has the frequency of each word of the training captions; it sums to one,
    or is zero if no word is known.
    """

    metric = "recall@1"

    def __init__(self, split: Split, probe: "type[Probe]", **options: Any):
        super().__init__(split, probe, **options)
        labels = [*split.pool.labels, *split.test.labels]
        self.captions = [caption for own in labels for caption in own]
        counts = torch.tensor([len(own) for own in labels])
        first = counts.cumsum(0) - counts
        self.counts, self.first = counts.to(self.device), first.to(self.device)
        owners = torch.arange(len(labels)).repeat_interleave(counts)
        self.caption_owners = owners.to(self.device)
        trained = [own for own, used in zip(split.pool.labels, split.train, strict=True) if used]
        words = sorted({w for own in trained for caption in own for w in _words(caption)})
        number = {word: code for code, word in enumerate(words)}
        self.outputs = len(words)
        bags = torch.zeros(len(self.captions), len(words))
        for bag, caption in zip(bags, self.captions, strict=True):
            known = [number[word] for word in _words(caption) if word in number]
            frequencies = torch.full((len(known),), 1 / max(1, len(known)))
            bag.index_add_(0, torch.tensor(known, dtype=torch.long), frequencies)
        self.bags = bags.to(self.device)

    def batch(self, items: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Return features `[b, D]`. In training, one drawn caption of each clip follows, `[b, V]`;
        otherwise all captions `[N, V]` and their clips in the batch, `[N]`.
        """
        clips = items.to(self.device)
        if generator is None:
            own = torch.isin(self.caption_owners, clips)
            owners = torch.searchsorted(clips, self.caption_owners[own])
            return self.features[clips], self.bags[own], owners
        drawn = torch.rand(len(clips), generator=generator).to(self.device)
        captions = self.first[clips] + (drawn * self.counts[clips]).long()
        return self.features[clips], self.bags[captions]

    def result(self, head: HeadResult) -> SplitResult:
        """Return the result of a head on the test clips."""
        credit = recall_credit(head.outputs, head.targets).mean(1).numpy()
        first = int(self.first[self.pool_items])
        nearest = tuple(self.captions[first + i] for i in head.outputs.argmax(1).tolist())
        return SplitResult(head.score, credit, nearest)


def _words(text: str, others: str = "_") -> list[str]:
    """Return the lower-case words of a text, of letters, digits, `others`, and the marks on them.

    In many scripts, vowels are marks, which `str.isalnum` and `\\w` leave out.
    """
    kept = ""
    for c in unicodedata.normalize("NFC", text.lower()):
        is_part = c.isalnum() or c in others
        is_part = is_part or (unicodedata.category(c)[0] == "M" and kept[-1:].strip())
        kept += c if is_part else " "
    return kept.split()


class TranscriptDataModule(EmbeddingsDataModule):
    """Frames of clips and their transcripts as characters, without case and punctuation."""

    metric = "word_accuracy"

    def __init__(self, split: Split, probe: "type[Probe]", **options: Any):
        super().__init__(split, probe, **options)
        labels = (*split.pool.labels, *split.test.labels)
        self.texts = [" ".join(_words(label, others="'")) for label in labels]
        used = zip(self.texts, split.train, strict=False)  # the pool comes first
        trained = [text for text, own in used if own]
        self.outputs = ("", *sorted(set().union(*trained)))  # the blank comes first
        number = {letter: code for code, letter in enumerate(self.outputs)}
        self.codes = [
            torch.tensor([number[letter] for letter in text if letter in number], dtype=torch.long)
            for text in self.texts
        ]

    def batch(self, items: Tensor, generator: torch.Generator | None = None) -> tuple[Any, ...]:
        """Return padded frames `[b, T, D]`, their lengths `[b]`, the characters of all transcripts
        `[ΣL]`, their number in each, `[b]`, and the transcripts.
        """
        assert self.frames
        codes = [self.codes[i] for i in items.tolist()]
        counts = torch.tensor([len(text) for text in codes])
        texts = [self.texts[i] for i in items.tolist()]
        return *self.frames(items), torch.cat(codes), counts, texts

    def result(self, head: HeadResult) -> SplitResult:
        """Return the result of a head on the test clips."""
        pairs = list(zip(head.outputs, head.targets, strict=True))
        # Counted per clip, so that the error rate of any subset of clips follows from sums.
        words = np.array([len(transcript.split()) for _, transcript in pairs], dtype=float)
        errors = np.array([_word_errors(*pair) for pair in pairs], dtype=float)
        units = jackknife(
            lambda clips: max(0.0, 1 - errors[clips].sum() / max(1.0, words[clips].sum())),
            self.split.test.group_numbers(),
        )
        return SplitResult(head.score, units, tuple(head.outputs))


def _word_errors(text: str, transcript: str) -> int:
    if not transcript:
        return len(text.split())
    found = jiwer.process_words(transcript, text)
    return found.substitutions + found.deletions + found.insertions
