"""The adapters, with the real packages of the suites if they are installed."""

import ast
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest
import soundfile
import torch

from tests.support.audio import tone
from tests.support.numeric import assert_frames_close
from whisper_aut import load_encoder
from whisper_aut.errors import UserError
from whisper_aut.export.adapters import mteb, xares, xares_llm
from whisper_aut.export.adapters.mteb import mteb_model
from whisper_aut.export.adapters.xares import WhisperAutEncoder

RUN = "runs/aut_tiny/latest"


def test_means_of_an_xares_batch_are_those_of_its_clips(pipeline_run: Path):
    encoder, plain = WhisperAutEncoder(str(pipeline_run / RUN)), load_encoder(pipeline_run / RUN)
    clips = [tone(seconds) for seconds in (1.0, 0.31, 40.0)]
    batch = torch.zeros(3, 40 * 16_000)
    for row, clip in zip(batch, clips, strict=True):
        row[: len(clip)] = torch.from_numpy(clip)
    frames = encoder(batch)
    assert frames.shape == (3, 2_000, encoder.output_dim)
    assert (encoder.hop_size_in_ms, encoder.sampling_rate) == (20, 16_000)
    assert_frames_close(frames.mean(1), plain.embed(clips, 16_000))
    assert_frames_close(frames[0, :50], plain.encode(clips[:1], 16_000)[0])
    assert encoder(torch.zeros(2, 8_000)).isfinite().all()  # silence


def test_xares_names_its_encoder_in_the_environment(
    pipeline_run: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("WHISPER_AUT_ENCODER", raising=False)
    with pytest.raises(UserError, match="WHISPER_AUT_ENCODER=DIR"):
        WhisperAutEncoder()
    monkeypatch.setenv("WHISPER_AUT_ENCODER", str(pipeline_run / RUN))
    monkeypatch.setenv("WHISPER_AUT_PADDING", "30s")
    assert WhisperAutEncoder().inner.padding == "30s"


@pytest.mark.parametrize("padding", ["none", "30s"])
def test_xares_llm_gets_all_frames_of_each_clip_and_their_mask(pipeline_run: Path, padding: str):
    encoder = xares_llm.WhisperAutEncoder(f"{pipeline_run / RUN}@{padding}")
    clips = [torch.from_numpy(tone(seconds)) for seconds in (1.0, 0.31, 2.0)]
    clips[0][-4_000:] = 0.0  # silence that belongs to the clip
    audio = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
    samples = torch.tensor([len(clip) for clip in clips])
    mask = (torch.arange(audio.shape[1]) < samples[:, None]).long()
    frames, frame_mask = encoder(audio, mask)
    assert frame_mask.sum(1).tolist() == [50, 16, 100]  # 20 ms each
    assert frames.shape == (3, 100, encoder.output_dim)
    alone = load_encoder(pipeline_run / RUN, padding=padding).encode(clips, 16_000)  # pyright: ignore[reportArgumentType]
    for row, row_mask, clip in zip(frames, frame_mask.bool(), alone, strict=True):
        assert_frames_close(row[row_mask], clip)
    unmasked, all_frames = encoder(audio[2])  # one clip without padding
    assert all_frames.sum() == 100
    assert_frames_close(unmasked[0], alone[2])
    torch.nn.Linear(encoder.output_dim, 4)(unmasked).sum().backward()  # as the projector's


def test_an_encoder_built_on_the_meta_device_has_its_weights(pipeline_run: Path):
    """As XARES-LLM builds it to load a projector that it has trained."""
    audio = torch.from_numpy(tone(0.5))[None]
    with torch.device("meta"):
        rebuilt = xares_llm.WhisperAutEncoder(str(pipeline_run / RUN))
    expected, _ = xares_llm.WhisperAutEncoder(str(pipeline_run / RUN))(audio)
    torch.testing.assert_close(rebuilt(audio)[0], expected)


@pytest.mark.parametrize("adapter", [xares, xares_llm, mteb])
def test_suites_are_imported_only_when_needed(adapter: ModuleType):
    imports = [
        node
        for node in ast.parse(inspect.getsource(adapter)).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    modules = [ast.unparse(node).split()[1].split(".")[0] for node in imports]
    assert not {"mteb", "xares", "xares_llm"} & set(modules)


@pytest.mark.parametrize("adapter", [xares, xares_llm])
def test_xares_finds_one_encoder_in_the_module(adapter: ModuleType):
    assert [name for name in dir(adapter) if name.endswith("Encoder")] == ["WhisperAutEncoder"]


def test_xares_accepts_and_runs_it(
    pipeline_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its checker, and its own encoding of a tar of our clips."""
    pytest.importorskip("xares")
    from xares.audio_encoder_checker import check_audio_encoder
    from xares.task import TaskConfig, XaresTask

    # X-ARES uses torchaudio.load, which needs torchcodec and FFmpeg; read with soundfile instead.
    monkeypatch.setattr("torchaudio.load", _read)
    monkeypatch.setenv("WHISPER_AUT_ENCODER", str(pipeline_run / RUN))
    from xares.utils import attr_from_py_path

    build = attr_from_py_path("whisper_aut/export/adapters/xares.py", endswith="Encoder")
    assert build is WhisperAutEncoder
    assert check_audio_encoder(build())
    env = tmp_path / "env" / "tones"
    env.mkdir(parents=True)
    (env / ".audio_tar_ready").touch()
    for split, domain in (("train", "speech"), ("valid", "music"), ("test", "sound")):
        source = sorted((pipeline_run / "data" / domain).glob("*.tar"))[0]
        (env / f"{split}.tar").write_bytes(source.read_bytes())
    config = TaskConfig(
        name="tones",
        formal_name="tones",
        eval_weight=1,
        env_root=str(tmp_path / "env"),
        private=True,
        encoder=build(),
        label_processor=lambda facts: int(facts["label"][-1]),
        output_dim=2,
        epochs=2,
        num_encoder_workers=0,
        num_training_workers=0,
        num_validation_workers=0,
    )
    task = XaresTask(config)
    task.make_encoded_tar()
    accuracy, clips = task.run_mlp()
    assert clips > 0
    assert 0.0 <= accuracy <= 1.0


def _read(file: str, **_: object) -> tuple[torch.Tensor, int]:
    samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    return torch.from_numpy(samples.T.copy()), rate


def test_mteb_evaluates_it(pipeline_run: Path, tmp_path: Path):
    evaluate = pytest.importorskip("mteb").evaluate
    datasets = pytest.importorskip("datasets")
    from mteb.mocks.mock_tasks.classification import MockAudioClassification

    class Tones(MockAudioClassification):
        """MTEB's own mock task on tones; arrays, as its Audio column needs FFmpeg."""

        def load_data(self, **_: object) -> None:
            rows = {
                "audio": [
                    {"array": tone(1.0, hertz, rate), "sampling_rate": rate}
                    for hertz in (300, 600)
                    for rate in (16_000, 8_000)
                ],
                "label": [1, 1, 2, 2],
            }
            part = datasets.Dataset.from_dict(rows)
            self.dataset = datasets.DatasetDict(
                {"test": part, "train": datasets.concatenate_datasets([part] * 4)}
            )
            self.data_loaded = True

    model = mteb_model(str(pipeline_run / RUN))
    results = evaluate(model, [Tones()], cache=None)
    assert results.task_results[0].get_score() > 0.5
    assert model.mteb_model_meta.revision == load_encoder(pipeline_run / RUN).fingerprint()


def test_missing_mteb_is_a_user_error(pipeline_run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    monkeypatch.setitem(sys.modules, "mteb.models", None)
    with pytest.raises(UserError, match=r"whisper-aut\[mteb\]"):
        mteb_model(str(pipeline_run / RUN))
