"""Every probe kind on a synthesised corpus of its own sort: what is there to be learned is learned,
and no more than that.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning import Trainer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score
from torch.utils.data import DataLoader
from torchmetrics.retrieval import RetrievalHitRate
from transformers import WhisperModel

from tests.support.audio import encode_audio
from tests.support.probes import embed_task
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.writer import ShardWriter
from whisper_aut.errors import UserError
from whisper_aut.inference.encoder import load_encoder
from whisper_aut.probes.datamodule import ClassDataModule, Frames, class_targets
from whisper_aut.probes.embed import Embeddings, EmbedSettings
from whisper_aut.probes.encoders import LogMelBaseline
from whisper_aut.probes.fit import PROBES, probe_splits
from whisper_aut.probes.metrics import class_metric, recall, recall_credit, text_metric
from whisper_aut.probes.modules import (
    AdamProbe,
    AttentionProbe,
    CTCProbe,
    LayerWeightedProbe,
    LinearProbe,
)
from whisper_aut.probes.splits import cross_validation, train_valid_test
from whisper_aut.probes.suite import run_suite

QUIET = EmbedSettings(quiet=True)


def ring(clips: int, seed: int) -> Embeddings:
    """Two classes, one around the other: no plane parts them."""
    rng = np.random.default_rng(seed)
    labels = np.arange(clips) % 2
    angle, radius = (
        rng.uniform(0, 2 * np.pi, clips),
        1 + 2 * labels + 0.2 * rng.standard_normal(clips),
    )
    features = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).astype(np.float32)
    return Embeddings(
        torch.from_numpy(features),
        tuple(map(str, labels)),
        tuple(f"{seed}:{i}" for i in range(clips)),
        {},
    )


def test_a_hidden_layer_separates_what_no_plane_does(monkeypatch):
    monkeypatch.setattr(AdamProbe, "max_epochs", 60)
    splits = cross_validation([ring(80, seed) for seed in range(3)])
    only = [{"rate": 0.1, "decay": 1e-4}]
    (linear,) = probe_splits(splits, kind="linear")
    (mlp,) = probe_splits(splits, kind="mlp", seeds=(0,), candidates=only)
    assert np.mean(linear.scores) < 0.7
    assert np.mean(mlp.scores) > 0.95


@pytest.mark.parametrize("kind", PROBES)
def test_a_probe_is_fitted_in_a_few_lines(kind, tmp_path):
    train, valid, test = (as_seen_by(kind, brief(60, seed)) for seed in range(3))
    split = train_valid_test({"train": train, "valid": valid, "test": test})
    probe, metric = PROBES[kind], LABELLED[kind][0] if kind in LABELLED else "accuracy"
    more = {"segment_seconds": 0.1} if kind == "frame" else {}
    data = probe.data_module(split, probe, metric=metric, **more)
    heads = probe.for_data(data)
    trainer = Trainer(
        max_epochs=3, logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    trainer.fit(heads, data)
    if kind != "knn":
        assert trainer.callback_metrics["valid/loss"] > 0
    (found,) = trainer.test(heads, data)
    assert 0 <= found[f"test/{metric}"] <= 1
    assert found[f"test/{metric}"] == pytest.approx(heads.results[0].score)
    if metric == "accuracy":
        right = heads.results[0].outputs.argmax(1) == heads.results[0].targets
        assert found["test/accuracy"] == pytest.approx(float(right.float().mean()))


def test_a_linear_probe_by_itself_is_scikit_learns():
    parts = (as_seen_by("linear", brief(60, seed)) for seed in range(3))
    split = train_valid_test(dict(zip(("train", "valid", "test"), parts, strict=True)))
    data = ClassDataModule(split, LinearProbe)
    probe = LinearProbe.for_data(data, [{"penalty": 0.5}])
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.fit(probe, data)
    trainer.test(probe, data)
    train, test = split.pool.features[:60], split.test.features
    mean, deviation = train.mean(0), train.std(0, correction=0)
    theirs = LogisticRegression(C=1 / 0.5, max_iter=5_000, tol=1e-8)
    theirs.fit(((train - mean) / deviation).double().numpy(), split.pool.labels[:60])
    expected = theirs.predict_proba(((test - mean) / deviation).double().numpy())
    found = probe.results[0].outputs.softmax(1).numpy()
    assert np.abs(found - expected).max() < 2e-3


def test_the_informative_layer_gets_the_weight():
    generator = torch.Generator().manual_seed(0)

    def layered(seed: int) -> Embeddings:
        labels = torch.arange(60) % 3
        features = torch.randn(60, 4, 8, generator=torch.Generator().manual_seed(seed))
        features[:, 2] += 2 * centres[labels]
        return Embeddings(
            features,
            tuple(f"c{int(i)}" for i in labels),
            tuple(f"{seed}:{i}" for i in range(60)),
            {},
        )

    centres = torch.randn(3, 8, generator=generator)
    splits = cross_validation([layered(seed) for seed in range(3)])
    only = [{"rate": 0.1, "decay": 1e-2}]
    (run,) = probe_splits(splits, kind="layers", seeds=(0,), candidates=only)
    assert np.mean(run.scores) > 0.9
    probe, part = LayerWeightedProbe(8, 3, layers=4), splits[0].pool
    answers = torch.tensor([int(label[1]) for label in part.labels])
    batch = part.features, answers, torch.ones(len(part), 1)
    Trainer(max_epochs=150, barebones=True).fit(probe, DataLoader([batch], batch_size=None))
    assert probe.layer_weights()[0].argmax() == 2


def brief(clips: int, seed: int) -> Embeddings:
    """Clips of 5 to 30 noisy frames, two of which say the class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    lengths = torch.randint(5, 30, (clips,), generator=generator).tolist()
    frames = []
    for clip, length in enumerate(lengths):
        one = torch.randn(length, 8, generator=generator)
        one[2:4] = 2 * centres[clip % 3] + torch.tensor(
            [*[0.0] * 7, 6.0]
        )  # what speaks is marked in the last dimension
        frames.append(one)
    labels = tuple(f"c{clip % 3}" for clip in range(clips))
    keys = tuple(f"{seed}:{i}" for i in range(clips))
    return Embeddings(torch.empty(0, 0), labels, keys, {}, (), tuple(frames))


def test_attention_finds_the_informative_frames():
    parts = [brief(60, seed) for seed in range(3)]
    means = [
        Embeddings(torch.stack([clip.mean(0) for clip in p.frames]), p.labels, p.keys, {})
        for p in parts
    ]
    only = [{"rate": 0.1, "decay": 1e-3}]
    attended = np.mean(
        probe_splits(cross_validation(parts), kind="attention", seeds=(0,), candidates=only)[
            0
        ].scores
    )
    averaged = np.mean(probe_splits(cross_validation(means), seeds=(0,))[0].scores)
    assert attended > 0.95
    assert averaged < attended - 0.05


def test_attention_scores_equal_a_loop_over_clips():
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(12, 4, generator=generator).split([3, 7, 2])
    frames = Frames(clips, np.array([True, True, False]))
    standard = [(clip - torch.cat(clips[:2]).mean(0)) / frames.deviation for clip in clips]
    torch.testing.assert_close(frames.deviation, torch.cat(clips[:2]).std(0, correction=0))
    probe = AttentionProbe(4, 5, [{"rate": 1e-3, "decay": 0.0}] * 2)
    for value in probe.parameters():
        value.data.copy_(torch.randn(value.shape, generator=generator))
    found = probe(*frames(torch.arange(3))).detach()
    for clip, own in enumerate(standard):
        for problem in range(2):
            weights = torch.softmax(own @ probe.query[problem], 0)
            wanted = (weights[:, None] * own).sum(0) @ probe.weight[problem]
            wanted = (wanted + probe.bias[problem]).detach()
            torch.testing.assert_close(found[clip, problem], wanted)


@pytest.mark.parametrize("padding", ["none", "30s"])
def test_layers_are_hugging_faces_hidden_states(tiny_whisper, padding):
    encoder = load_encoder(str(tiny_whisper), padding=padding)
    waveforms = [
        torch.randn(samples, generator=torch.Generator().manual_seed(samples)) * 0.1
        for samples in (8_000, 20_000)
    ]
    found = encoder.encode(waveforms, 16_000, layers=(0, 1, 2))
    for clip, last in zip(found, encoder.encode(waveforms, 16_000), strict=True):
        torch.testing.assert_close(clip[2], last)
    if padding == "30s":
        from transformers import WhisperFeatureExtractor

        whisper = WhisperModel.from_pretrained(tiny_whisper).eval()
        mel = WhisperFeatureExtractor()(
            [w.numpy() for w in waveforms], sampling_rate=16_000, return_tensors="pt"
        ).input_features
        with torch.no_grad():
            theirs = whisper.encoder(mel, output_hidden_states=True).hidden_states
        for i, clip in enumerate(found):
            for layer in (0, 1, 2):
                torch.testing.assert_close(
                    clip[layer], theirs[layer][i, : clip.shape[1]], atol=2e-5, rtol=1e-4
                )


def test_metrics_equal_scikit_learns_and_torchmetrics_own():
    generator = torch.Generator().manual_seed(0)
    scores, answers = (
        torch.randn(200, 7, generator=generator),
        (torch.rand(200, 7, generator=generator) < 0.3).float(),
    )
    assert class_metric("mAP", 7, scores, answers) == pytest.approx(
        average_precision_score(answers, scores), abs=1e-5
    )
    for average in ("macro", "micro"):
        theirs = f1_score(answers, scores > 0, average=average)
        assert class_metric(f"segment_f1_{average}", 7, scores, answers) == pytest.approx(
            theirs, abs=1e-6
        )
    assert text_metric(["a b c d"], ["a x c"]) == pytest.approx(1 - 2 / 3)
    assert text_metric(["a b c d e f g"], ["z"]) == 0.0
    owner = torch.arange(20).repeat_interleave(5)
    similarity = torch.randn(20, 100, generator=generator)
    similarity[torch.arange(20), torch.arange(20) * 5] += 2
    hit = RetrievalHitRate(top_k=1)
    right = torch.nn.functional.one_hot(owner).T.bool()
    to_text = hit(
        similarity.flatten(), right.flatten(), indexes=torch.arange(20).repeat_interleave(100)
    )
    to_audio = hit(
        similarity.T.flatten(), right.T.flatten(), indexes=torch.arange(100).repeat_interleave(20)
    )
    assert recall(similarity, owner) == pytest.approx(float(to_text + to_audio) / 2, abs=1e-6)
    assert recall_credit(similarity, owner).mean() == pytest.approx(recall(similarity, owner))


def test_an_event_counts_from_the_beginning_of_its_clip():
    events = ((-0.05, 3.0, "dog"), (-3.0, -2.0, "cat"), (8.0, 99.0, "cat"))
    clip = Embeddings(torch.zeros(10, 2), (events,), lengths=(10,))
    dog, cat = class_targets(clip, "events", ["dog", "cat"], 1.0).T
    assert dog.nonzero()[:, 0].tolist() == [0, 1, 2]
    assert cat.nonzero()[:, 0].tolist() == [8, 9]


def test_marks_belong_to_the_words_of_a_transcript():
    labels = ("हिन्दी, भाषा!", "Cafe\u0301 at 5 o'clock ❤\ufe0f")
    frames = tuple(torch.zeros(20, 4) for _ in labels)
    clips = Embeddings(torch.empty(0, 0), labels, frames=frames)
    split = train_valid_test({"train": clips, "valid": clips, "test": clips})
    texts = CTCProbe.data_module(split, CTCProbe).texts
    assert texts[:2] == ["हिन्दी भाषा", "café at 5 o'clock"]


def test_average_precision_of_logits_of_any_size_over_the_classes_that_occur():
    generator = torch.Generator().manual_seed(0)
    for low, high in ((17, 40), (-40, -17), (-120, -90), (-1, 1)):
        scores = low + (high - low) * torch.rand(300, 6, generator=generator)
        scores[:, 3:] = scores[:, 3:].round()  # true ties
        answers = (
            torch.rand(300, 6, generator=generator) < torch.tensor([0.01, 0.1, 0.3, 0.01, 0.1, 0.9])
        ).float()
        answers[:5] = 1
        theirs = [average_precision_score(answers[:, i], scores[:, i]) for i in range(6)]
        assert class_metric("mAP", 6, scores, answers) == pytest.approx(np.mean(theirs), abs=1e-5)
        answers[:, :4] = 0
        assert class_metric("mAP", 6, scores, answers) == pytest.approx(
            np.mean(theirs[4:]), abs=1e-5
        )
    assert class_metric("mAP", 6, scores, torch.zeros(300, 6)) == 0.0


def test_a_class_of_events_that_is_only_validated_on_changes_nothing():
    train, valid, test = (as_seen_by("frame", brief(60, seed)) for seed in range(3))
    odd = replace(valid, labels=(*valid.labels[:-1], (*valid.labels[-1], (0.0, 0.1, "only here"))))
    with_it, without = (
        probe_splits(
            [train_valid_test({"train": train, "valid": part, "test": test})],
            metric="segment_f1_macro",
            kind="frame",
            seeds=(0,),
            segment_seconds=0.1,
        )
        for part in (odd, valid)
    )
    assert with_it[0].scores == without[0].scores
    assert with_it[0].candidates == without[0].candidates


PITCHES = {"a": 400.0, "b": 1000.0, "c": 2500.0}
WORDS = {"a": "dog", "b": "bird", "c": "bell"}


def sing(letters: str, rng: np.random.Generator, seconds: float = 0.2) -> np.ndarray:
    time = np.arange(int(seconds * 16_000)) / 16_000
    parts = [
        0.2 * np.sin(2 * np.pi * PITCHES[letter] * time) if letter in PITCHES else 0 * time
        for letter in letters
    ]
    wave = np.concatenate(parts)
    return (wave + 0.02 * rng.standard_normal(len(wave))).astype(np.float32)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Sequences of three tones, labelled as classes, events, captions and spelled transcripts."""
    root = tmp_path_factory.mktemp("scenes")
    for split, clips in {"train": 60, "valid": 24, "test": 24}.items():
        rng = np.random.default_rng([clips, *split.encode()])
        with ShardWriter(root / "scenes" / split) as shards:
            for number in range(clips):
                letters = "".join(rng.choice(list("abc_"), 3))
                letters = letters if set(letters) - {"_"} else "a__"
                events = [
                    {"start": 0.2 * i, "end": 0.2 * (i + 1), "note": letter}
                    for i, letter in enumerate(letters)
                    if letter != "_"
                ]
                letters_present = sorted(set(letters) - {"_"})
                captions = {
                    f"caption_{i}": f"{start} {' and '.join(WORDS[x] for x in letters_present)}"
                    for i, start in enumerate(("a", "the"))
                }
                extra = {"events": events, "tags": ";".join(letters_present), **captions}
                facts = Annotation(
                    text=" ".join(letters.replace("_", "")),
                    label=letters_present[0],
                    duration_seconds=0.6,
                    extra=extra,
                )
                shards.write(f"{number}", "flac", encode_audio(sing(letters, rng)), facts)
    return root


CASES = {
    "linear": ({"metric": "mAP", "label": "tags", "separator": ";"}, 0.9),
    "mlp": ({"metric": "mAP", "label": "tags", "separator": ";", "kind": "mlp"}, 0.9),
    "frame": (
        {
            "metric": "segment_f1_micro",
            "label": "events",
            "event": ["start", "end", "note"],
            "segment_seconds": 0.1,
        },
        0.9,
    ),
    "frame, macro": (
        {
            "metric": "segment_f1_macro",
            "label": "events",
            "event": ["start", "end", "note"],
            "segment_seconds": 0.2,
        },
        0.9,
    ),
    "retrieval": ({"metric": "recall@1", "label": "caption_*"}, 0.15),
    "transcription": ({"metric": "word_accuracy", "label": "text"}, 0.4),
}


@pytest.mark.parametrize("case", CASES)
def test_every_answer_is_learned_and_paired(case, scenes, task_with, tmp_path, monkeypatch):
    for probe in (AdamProbe, CTCProbe):
        monkeypatch.setattr(probe, "max_epochs", 60)
    changes, least = CASES[case]
    folders = {split: [f"{{root}}/scenes/{split}"] for split in ("train", "valid", "test")}
    task = task_with(name=case.split(",")[0], **folders, **changes)
    scores = run_suite(
        {"mel": LogMelBaseline(), "same": LogMelBaseline()},
        [task],
        root=scenes,
        cache=tmp_path,
        seeds=(0,),
        against=["mel"],
        embedding=QUIET,
    )
    entry = scores.entries[0]
    assert entry.kind == case.split(",")[0]
    assert entry.mean > least
    assert np.mean(entry.per_unit()) == pytest.approx(entry.mean, abs=1e-5)
    assert scores.comparisons[0].p_value == 1.0
    assert type(scores).from_json(scores.to_json()) == scores


def test_layers_are_probed_and_only_where_there_are_any(scenes, task_with, tiny_whisper, tmp_path):
    folders = {split: [f"{{root}}/scenes/{split}"] for split in ("train", "valid", "test")}
    task = task_with(**folders, kind="layers")
    encoder = load_encoder(f"{tiny_whisper}@none")
    found = embed_task(encoder, task, scenes, tmp_path, QUIET, kind="layers")
    assert found["train"].features.shape == (60, 3, 32)
    only = [{"rate": 0.1, "decay": 1e-2}]
    (run,) = probe_splits([train_valid_test(found)], kind="layers", seeds=(0,), candidates=only)
    assert run.scores[0] > 0.4
    two = EmbedSettings(layers=(0, 2), quiet=True)
    some = embed_task(encoder, task, scenes, tmp_path, two)
    torch.testing.assert_close(some["test"].features[:, 32:], found["test"].features[:, 2])
    with pytest.raises(UserError, match="returns no single layers"):
        embed_task(LogMelBaseline(), task, scenes, tmp_path, QUIET, kind="layers")
    with pytest.raises(UserError, match=r"layers 0 .* to 2; requested: 3"):
        embed_task(encoder, task, scenes, tmp_path, EmbedSettings(layers=(3,), quiet=True))


LABELLED = {
    "frame": ("segment_f1_macro", lambda label, frames: ((0.0, 0.1 * frames, label),)),
    "retrieval": ("recall@1", lambda label, frames: (f"a {label}", f"the {label}")),
    "transcription": ("word_accuracy", lambda label, frames: label),
}


def as_seen_by(kind: str, part: Embeddings) -> Embeddings:
    """Frames and classes of clips → what a kind of probe is given."""
    _, labelled = LABELLED.get(kind, ("", lambda label, frames: label))
    labels = tuple(
        labelled(label, len(clip)) for label, clip in zip(part.labels, part.frames, strict=True)
    )
    part = replace(part, labels=labels)
    if PROBES[kind].features == "frames":
        return part
    if PROBES[kind].features == "segments":
        lengths = tuple(len(clip) for clip in part.frames)
        return replace(part, features=torch.cat(part.frames), lengths=lengths, frames=())
    means = torch.stack([clip.mean(0) for clip in part.frames])
    features = torch.stack([means, -means], 1) if PROBES[kind].features == "layers" else means
    return replace(part, features=features, frames=())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", PROBES)
def test_every_kind_is_fitted_on_a_gpu(kind):
    splits = cross_validation([as_seen_by(kind, brief(60, seed)) for seed in range(3)])
    metric = LABELLED[kind][0] if kind in LABELLED else "accuracy"
    (found,), (expected,) = (
        probe_splits(
            splits,
            metric=metric,
            kind=kind,
            seeds=(0,),
            candidates=PROBES[kind].candidates[:1],
            segment_seconds=0.1,
            device=device,
        )
        for device in ("cuda", "cpu")
    )
    assert found.scores == pytest.approx(expected.scores, abs=0.05)


def test_every_kind_is_tested_above():
    assert {"attention", "knn", "layers", *(case.split(",")[0] for case in CASES)} == set(PROBES)
