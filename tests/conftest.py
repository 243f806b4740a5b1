"""Fixtures of all tests: a tiny Whisper and language model, tiny shards, a finished run, the real
corpora.
"""

import gc
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support.environment import clean

# Before torch and transformers read it; commands that tests start inherit the result.
clean(os.environ)
sys.warnoptions.clear()  # what PYTHONWARNINGS added; processes that tests start would inherit it
gc.set_threshold(100_000, 20, 20)  # the imports and tests take a tenth less time

import pytest
import torch
import yaml
from transformers import WhisperForConditionalGeneration

from tests.support import REPOSITORY
from tests.support.audio import TEXTS, TONES, encode_audio, tone, write_shards
from tests.support.numeric import enlarge
from whisper_aut import config as config_module
from whisper_aut.data.targets import Instruction, Instructions
from whisper_aut.models.tiny import LanguageScratch, make_language_model, make_whisper
from whisper_aut.pipeline import run_config

torch.set_num_threads(1)


SLOW_TIMEOUT_SECONDS = 1800


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs from tests that are not about them."""
    if "not gpu" in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give slow tests time: they start process after process, on a machine that may be busy."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_SECONDS))


def pytest_collection_finish() -> None:
    """Let garbage collections pass over what was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def undo_deepspeed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo DeepSpeed's changes to this process: environment variables, `functional.linear`."""
    monkeypatch.setattr("torch.nn.functional.linear", torch.nn.functional.linear)
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="session", autouse=True)
def shipped_configs_are_composed_once() -> Iterator[None]:
    """Compose a shipped config once for each choice of groups. Hydra takes 70 ms for it."""
    original, composed = config_module._compose_groups, {}
    shipped = config_module.PACKAGE_CONF.resolve()

    def compose_groups(path: Path, folders: Sequence[Path], choices: Mapping[str, str]) -> Any:
        if not all(folder.is_relative_to(shipped) for folder in folders):
            return original(path, folders, choices)
        key = (path.resolve(), *folders, *choices.items())
        if key not in composed:
            composed[key] = original(path, folders, choices)
        return composed[key]  # `compose` merges overrides into a copy

    with mock.patch.object(config_module, "_compose_groups", compose_groups):
        yield


@pytest.fixture(scope="session")
def tiny_whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised Whisper of two layers, with a tokenizer of its own."""
    out = tmp_path_factory.mktemp("whisper") / "tiny"
    return make_whisper(
        out,
        TEXTS * 4,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        heads=2,
        num_mel_bins=80,
        vocabulary=320,
        seed=0,
    )


@pytest.fixture(scope="session")
def life_size_whisper(tiny_whisper: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_whisper` with an encoder whose values are of whisper-base's size."""
    out = tmp_path_factory.mktemp("whisper") / "life_size"
    shutil.copytree(tiny_whisper, out)
    model = WhisperForConditionalGeneration.from_pretrained(out)
    enlarge(model.model.encoder)
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `speech`, `sound` and `music` shards."""
    root = tmp_path_factory.mktemp("shards")
    for domain, clips in (("speech", 23), ("sound", 11), ("music", 9)):
        write_shards(root / domain, clips, domain)
    return root


@pytest.fixture(scope="session")
def tiny_language_model(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """A Qwen3 of two layers, trained on the texts of the tiny shards, with its own tokenizer."""
    texts = [str(tiny_shards / domain) for domain in ("speech", "sound", "music")]
    out = str(tmp_path_factory.mktemp("language"))
    scratch = LanguageScratch(
        texts,
        out,
        width=32,
        layers=2,
        heads=4,
        vocabulary=400,
        steps=60,
        batch_texts=16,
        lr=1e-2,
        noise=0.0,
    )
    return Path(
        make_language_model(
            scratch, Instructions({"caption": Instruction(["Describe it.", "What is it?"])})
        )
    )


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real corpora next to the checkout; without it, tests that need it skip."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("there are no real corpora next to the checkout")
    return folder


@pytest.fixture(scope="session")
def pipeline_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_whisper: Path, tiny_shards: Path
) -> Path:
    """A folder with a finished run `runs/aut_tiny/latest`, `clip.wav`, `clips/` and shards in
    `data/`.
    """
    folder = tmp_path_factory.mktemp("run")
    (folder / "tones.yaml").write_text(yaml.safe_dump(TONES))
    licences = {"speech": "CC0-1.0", "sound": "CC-BY-3.0", "music": ""}  # music says none
    sources = ", ".join(
        f"{{path: {tiny_shards / domain}, domain: {domain}, licence: '{licence}'}}"
        for domain, licence in licences.items()
    )
    config = REPOSITORY / "conf" / "smoke.yaml"
    overrides = [
        "name=aut_tiny",
        f"runs={folder / 'runs'}",
        "corpora.demo=null",
        "model.after=",
        f"model.path={tiny_whisper}",
        f"data.train=[{sources}]",
        f"data.valid=[{sources}]",
        "trainer.max_steps=2",
        "trainer.valid_every_steps=2",
        f"probe.root={tiny_shards}",
        f"probe.tasks=[{folder / 'tones.yaml'}]",
    ]
    run_config(config, overrides)
    (folder / "clip.wav").write_bytes(encode_audio(tone(1.0), kind="WAV"))
    (folder / "clips").mkdir()
    for hertz in (220, 440, 880):
        (folder / "clips" / f"{hertz}.flac").write_bytes(encode_audio(tone(0.8, hertz)))
    (folder / "data").symlink_to(tiny_shards)
    return folder


@pytest.fixture
def in_pipeline_run(pipeline_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `pipeline_run` as the working directory."""
    monkeypatch.chdir(pipeline_run)
    return pipeline_run
