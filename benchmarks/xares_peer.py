"""X-ARES as the other side of the probe benchmarks: its own trainer where the package `xares` is
installed, its loop written out otherwise.

In: features and answers of a training pool and of the fold that is reported. Out: the accuracy it
would report, the best epoch's on that fold. The package reads one tar of embeddings a split again
in every epoch, as its tasks do; the loop keeps them in memory. `task` needs the package: a whole
task of five folds, from tars of audio to both of its scores.
"""

import io
import json
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import WhisperFeatureExtractor, WhisperModel
from webdataset.writer import TarWriter

EPOCHS, BATCH = 10, 32
Part = tuple[Tensor, Tensor]  # features [B, D], answers [B]

try:
    NAME = f"xares {version('xares')}, its Trainer on tars of embeddings"
except PackageNotFoundError:
    NAME = "X-ARES's training loop in plain PyTorch, embeddings in memory"


def installed() -> str:
    """Return the name and version of the package, or nothing."""
    return NAME.partition(",")[0] if NAME.startswith("xares") else ""


def clips(urls: list[str]) -> list[Tensor]:
    """Read tars of audio as X-ARES does before it encodes them, in this process: each clip `[S]` at
    16 kHz.
    """
    from loguru import logger  # pyright: ignore[reportMissingImports]
    from xares.audiowebdataset import create_rawaudio_webdataset  # pyright: ignore[reportMissingImports]

    logger.disable("xares")
    torchaudio.load = _load
    batches = create_rawaudio_webdataset(
        urls, target_sample_rate=16_000, num_workers=0, batch_size=1
    )
    return [audio[0] for (audio, _), *_ in batches]


def training(pool: Part, test: Part, rate: float) -> float:
    """Train once and return the accuracy that is reported."""
    torch.manual_seed(42)
    return _package(pool, test, rate) if NAME.startswith("xares") else _loop(pool, test, rate)


def task(shards: Path, classes: list[str], whisper: Path) -> tuple[float, float]:
    """Run a task as X-ARES runs it: frames of every clip into tars, its trainer once a fold, its
    nearest neighbours.

    Args:
        shards: holds a folder of tars for each fold, `1` to `5`; samples have a `label`.
        whisper: a Hugging Face directory; the encoder hears clips in 30 s of silence.

    Returns:
        Accuracies of the trainer and of the neighbours.
    """
    from loguru import logger  # pyright: ignore[reportMissingImports]
    from xares.task import TaskConfig, XaresTask  # pyright: ignore[reportMissingImports]

    logger.disable("xares")
    # torchaudio's own needs torchcodec and FFmpeg; without them X-ARES silently drops every clip.
    torchaudio.load = _load
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "task")
        home.mkdir()
        (home / ".audio_tar_ready").touch()
        for fold in "12345":
            for number, tar in enumerate(sorted((shards / fold).glob("*.tar"))):
                (home / f"wds-audio-fold-{fold}-{number:06d}.tar").symlink_to(tar.resolve())
        config = TaskConfig(
            name="task",
            env_root=folder,
            k_fold_splits=list("12345"),
            output_dim=len(classes),
            encoder=PaddedWhisper(whisper),
            label_processor=lambda facts: classes.index(facts["label"]),
            num_encoder_workers=0,
        )
        running = XaresTask(config)
        running.make_encoded_tar()
        return float(running.run_mlp()[0]), float(running.run_knn()[0])


def _load(file: str, **_: object) -> tuple[Tensor, int]:
    samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    return torch.from_numpy(samples.T), rate


class PaddedWhisper(nn.Module):
    """Whisper's encoder as X-ARES wants it: `[B, S]` → `[B, 1500, D]`, silence included."""

    sampling_rate, hop_size_in_ms = 16_000, 20

    def __init__(self, whisper: Path):
        super().__init__()
        self.encoder, self.extract = (
            WhisperModel.from_pretrained(whisper).encoder.eval(),
            WhisperFeatureExtractor(),
        )
        self.output_dim = self.encoder.config.d_model

    def forward(self, audio: Tensor) -> Tensor:
        mel = self.extract(
            list(audio.numpy()), sampling_rate=self.sampling_rate, return_tensors="pt"
        ).input_features
        return self.encoder(mel).last_hidden_state


def _package(pool: Part, test: Part, rate: float) -> float:
    from loguru import logger  # pyright: ignore[reportMissingImports]
    from xares.audiowebdataset import create_embedding_webdataset  # pyright: ignore[reportMissingImports]
    from xares.models.simple import Mlp  # pyright: ignore[reportMissingImports]
    from xares.trainer import Trainer  # pyright: ignore[reportMissingImports]

    logger.disable("xares")
    with tempfile.TemporaryDirectory() as folder:
        loaders = []
        for name, part in (("pool", pool), ("test", test)):
            tar = Path(folder, f"{name}.tar")
            _write(tar, part)
            loaders.append(
                create_embedding_webdataset(
                    [str(tar)],
                    tar_shuffle=2000 if name == "pool" else None,
                    batch_size=BATCH,
                    num_workers=0,
                    training=name == "pool",
                    label_processor=_answer,
                )
            )
        model = Mlp(
            in_features=pool[0].shape[1],
            out_features=int(pool[1].max()) + 1,
            criterion="CrossEntropyLoss",
        )
        trainer = Trainer(
            model,
            device="cpu",
            ckpt_dir=f"{folder}/checkpoints",
            lr=rate,
            max_epochs=EPOCHS,
            metric="accuracy",
        )
        trainer.run(*loaders)
        best = torch.load(f"{folder}/checkpoints/best_model.pt", weights_only=True)
        return trainer.load_state_dict(best).run_inference(loaders[1])


def _write(tar: Path, part: Part) -> None:
    with TarWriter(str(tar)) as writer:
        for number, (features, answer) in enumerate(zip(*part, strict=True)):
            buffer = io.BytesIO()
            np.save(buffer, features.numpy()[None])
            answered = json.dumps({"answer": int(answer)}).encode()
            writer.write({"__key__": f"{number:06d}", "npy": buffer.getvalue(), "json": answered})


def _answer(facts: dict[str, int]) -> int:
    return facts["answer"]


def _loop(pool: Part, test: Part, rate: float) -> float:
    train, reported = (
        DataLoader(TensorDataset(*pool), BATCH, shuffle=True),
        DataLoader(TensorDataset(*test), BATCH),
    )
    width, classes = pool[0].shape[1], int(pool[1].max()) + 1
    model = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS, eta_min=rate / 10)
    best = 0.0
    for _ in range(EPOCHS):
        for features, answers in train:
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(features), answers).backward()
            optimiser.step()
        schedule.step()
        with torch.inference_mode():
            right = sum(
                int((model(features).argmax(1) == answers).sum()) for features, answers in reported
            )
        best = max(best, right / len(test[1]))
    return best
