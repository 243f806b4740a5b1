"""Embedding for users: files, arrays and shards in, the same vectors out by every way, and nothing
fatal about a bad file.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from torch.testing import assert_close

from tests.support.audio import encode_audio, tone
from tests.support.numeric import assert_frames_close
from whisper_aut import load_encoder
from whisper_aut.cli import main
from whisper_aut.errors import UserError
from whisper_aut.inference.embed import Origin, Vectors, embed_paths
from whisper_aut.inference.encoder import AudioEncoder
from whisper_aut.inference.search import SearchIndex

RUN = "runs/aut_tiny/latest"


@pytest.fixture(scope="module")
def encoder(pipeline_run: Path) -> AudioEncoder:
    return load_encoder(pipeline_run / RUN)


def test_files_need_no_rate_and_equal_arrays(in_pipeline_run: Path, encoder: AudioEncoder):
    high = tone(0.7, 500, sample_rate_hz=44_100)
    soundfile.write(in_pipeline_run / "high.wav", high, 44_100, subtype="FLOAT")
    by_file, by_array = encoder.encode(["high.wav"]), encoder.encode([high], sample_rate_hz=44_100)
    assert torch.equal(by_file[0], by_array[0])
    (in_pipeline_run / "high.wav").unlink()
    with pytest.raises(UserError, match="pass sample_rate_hz"):
        encoder.encode([high])
    with pytest.raises(UserError, match="Give a list of clips"):
        encoder.encode("clip.wav")
    with pytest.raises(UserError, match="Give a list of clips"):
        encoder.embed(Path("clip.wav"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=r"gone\.wav cannot be used: missing file"):
        encoder.encode(["clip.wav", "gone.wav"])
    (in_pipeline_run / "bad.wav").write_bytes(b"RIFFbroken")
    with pytest.raises(UserError, match=r"bad\.wav cannot be used: undecodable audio: .*[^.]\.$"):
        encoder.encode(["bad.wav"])
    (in_pipeline_run / "bad.wav").unlink()
    with pytest.raises(UserError, match=r"layers 0 .* to 2, not 3"):
        encoder.encode(["clip.wav"], layers=[3])


def test_batches_by_seconds_change_nothing(encoder: AudioEncoder):
    clips = [tone(seconds) for seconds in (0.5, 2.0, 0.2, 1.1)]
    whole, one_by_one = (
        encoder.encode(clips, 16_000, batch_seconds=seconds) for seconds in (100.0, 0.1)
    )
    for clip, other in zip(whole, one_by_one, strict=True):
        assert_frames_close(clip, other)


def test_long_audio_is_encoded_in_windows(encoder: AudioEncoder):
    noise = np.random.default_rng(0).standard_normal(70 * 16_000).astype(np.float32) * 0.1
    (frames,) = encoder.encode([noise], 16_000)
    assert frames.shape == (3_500, encoder.width)
    (first,) = encoder.encode([noise[: 30 * 16_000]], 16_000)
    (second,) = encoder.encode([noise[28 * 16_000 : 58 * 16_000]], 16_000)
    assert torch.equal(
        frames[:1_450], first[:1_450]
    )  # each instant from the window in which it lies farther from the edge
    assert torch.equal(frames[1_450:2_850], second[50:1_450])
    assert encoder.encode([noise], 16_000, layers=[0, 2])[0].shape == (2, 3_500, encoder.width)


def test_no_clips_are_no_rows_of_the_same_shape(encoder: AudioEncoder):
    for options in ({}, {"pooling": "mean_std"}, {"layers": [0, 2]}):
        one = encoder.embed([np.ones(1600, np.float32)], 16_000, **options)
        assert encoder.embed([], **options).shape == (0, *one.shape[1:])


def test_pooled_vectors_are_means_of_valid_frames(encoder: AudioEncoder):
    clips = [tone(seconds) for seconds in (0.5, 1.3)]
    frames = encoder.encode(clips, 16_000)
    assert torch.equal(encoder.embed(clips, 16_000), torch.stack([clip.mean(0) for clip in frames]))
    spread = encoder.embed(clips, 16_000, pooling="mean_std", layers=[1, 2])
    assert spread.shape == (2, 2, 2 * encoder.width)
    assert_close(spread[1, 1, encoder.width :], frames[1].std(0, correction=0))
    with pytest.raises(UserError, match="Pooling must be one of"):
        encoder.embed(clips, 16_000, pooling="max")


def test_precisions_and_devices(in_pipeline_run: Path, encoder: AudioEncoder):
    rough = load_encoder(RUN, dtype="bf16").embed(["clip.wav"])
    assert torch.nn.functional.cosine_similarity(rough, encoder.embed(["clip.wav"])).item() > 0.999
    with pytest.raises(UserError, match=r"dtype must be .*Did you mean 'fp16'"):
        load_encoder(RUN, dtype="f16")
    assert load_encoder(RUN, device="auto").device.type in ("cpu", "cuda")
    with pytest.raises(UserError, match="Device 'cuda:99' cannot be used"):
        load_encoder(RUN, device="cuda:99")


def test_files_folders_and_shards_give_what_the_encoder_gives(
    in_pipeline_run: Path, encoder: AudioEncoder
):
    found = embed_paths(encoder, ["clip.wav", "clips", "data/music"], name="x")
    assert found.names[:4] == ("clip.wav", "clips/220.flac", "clips/440.flac", "clips/880.flac")
    assert len(found) == 4 + 9
    assert_frames_close(found.values[:4], encoder.embed(list(found.names[:4])))
    assert found.names[4].startswith("data/music/")
    assert found.seconds[0] == 1.0
    frames = embed_paths(
        encoder,
        ["clips"],
        name="x",
        pooling=None,
        layers=(0, 2),
        batch_seconds=0.5,
    )
    expected = encoder.encode([f"clips/{hertz}.flac" for hertz in (220, 440, 880)], layers=[0, 2])
    for clip, reference in zip(frames.frames(), expected, strict=True):
        assert_frames_close(clip.transpose(0, 1), reference)


@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
def test_a_file_holds_what_was_written(
    suffix: str, in_pipeline_run: Path, tmp_path: Path, encoder: AudioEncoder
):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    options = [{"layers": (0, 1)}, {}, {"pooling": None}]
    for one in options[: 2 if suffix == ".parquet" else 3]:
        written = embed_paths(encoder, ["clips"], name=RUN, **one)
        written.save(tmp_path / f"x{suffix}")
        read = Vectors.load(tmp_path / f"x{suffix}")
        assert (read.names, read.seconds, read.origin, read.lengths) == (
            written.names,
            written.seconds,
            written.origin,
            written.lengths,
        )
        assert torch.equal(read.values, written.values)
    assert [path.name for path in tmp_path.iterdir()] == [f"x{suffix}"]
    whole = (tmp_path / f"x{suffix}").read_bytes()
    (tmp_path / f"x{suffix}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        Vectors.load(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
def test_names_may_not_be_utf_8(suffix: str, tmp_path: Path):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    skipped = {"caf\udce9.mp3": "silent audio"}
    vectors = Vectors(("caf\udce9.wav",), (1.0,), torch.ones(1, 2), Origin("", ""), (), skipped)
    vectors.save(tmp_path / f"x{suffix}")
    read = Vectors.load(tmp_path / f"x{suffix}")
    assert read.names == (("caf\\udce9.wav",) if suffix == ".parquet" else vectors.names)
    assert read.skipped == skipped


def test_the_command_counts_bad_files_and_goes_on(
    in_pipeline_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "good.flac").write_bytes(encode_audio(tone(0.6)))
    (folder / "broken.wav").write_text("not audio")
    (folder / "silent.wav").write_bytes(encode_audio(np.zeros(16_000, np.float32), kind="WAV"))
    (folder / "notes.txt").write_text("not looked at")
    out = tmp_path / "x.safetensors"
    assert main(["embed", RUN, str(folder), "--out", str(out), "--pooling", "mean_std"]) == 0
    shown = capsys.readouterr().out
    assert "1 clips" in shown
    assert "Clips skipped: 2 (1 × undecodable audio, 1 × silent audio)." in shown
    with safe_open(out, framework="pt") as file:  # as a user without this package reads it
        assert file.get_tensor("embeddings").shape == (1, 64)
        assert json.loads(file.metadata()["names"]) == [str(folder / "good.flac")]
    (folder / "good.flac").unlink()
    assert main(["embed", RUN, str(folder), "--out", str(out)]) == 1
    assert "No clip of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", RUN, "clips", "--out", "x.json"], "stored in .safetensors or .parquet"),
        (["embed", RUN, "nowhere", "--out", "x.safetensors"], "There is no file or folder nowhere"),
        (["embed", RUN, "runs", "--out", "x.safetensors"], "no shards and no audio files"),
        (
            ["embed", "nowhere", "clips", "--out", "x.safetensors"],
            "There is no model directory nowhere",
        ),
        (["embed", RUN, "clips", "--out", "x.safetensors", "--layers", "7"], "layers 0"),
        (["embed", RUN, "clips", "--out", "x.parquet", "--frames"], "one vector per clip"),
        (
            ["search", "nowhere.safetensors", "clip.wav"],
            "whisper-aut embed ENCODER FOLDER --out nowhere.safetensors",
        ),
        (["search", "clip.wav", "clip.wav"], "stored in .safetensors"),
    ],
)
def test_mistakes_are_user_errors(
    arguments: list[str], message: str, in_pipeline_run: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
    assert not list(in_pipeline_run.glob("x.*"))


def test_search_runs_the_encoder_in_the_precision_of_the_index(
    in_pipeline_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    index = str(tmp_path / "clips.safetensors")
    assert main(["embed", f"{RUN}@30s", "clips", "--out", index, "--dtype", "bf16"]) == 0
    searched = SearchIndex(Vectors.load(Path(index)))
    assert (searched.origin.dtype, searched.origin.padding) == ("bf16", "30s")
    assert searched.open_encoder().dtype == "bf16"
    assert searched.open_encoder(dtype="fp32").dtype == "fp32"
    for dtype in ([], ["--dtype", "fp32"]):
        capsys.readouterr()
        assert main(["search", index, "clips/440.flac", "--batch-seconds", "30", *dtype]) == 0
        assert capsys.readouterr().out.splitlines()[0].split()[1] == "clips/440.flac"


def test_search_finds_the_clip_itself_first(
    in_pipeline_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    index = tmp_path / "clips.safetensors"
    assert main(["embed", RUN, "clips", "data/sound", "--out", str(index)]) == 0
    capsys.readouterr()
    assert main(["search", str(index), "clips/440.flac", "-k", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == " 1.0000  clips/440.flac"
    assert len(lines) == 3
    # The order is that of cosines computed in NumPy.
    vectors = Vectors.load(index)
    values = vectors.values.numpy()
    units = values / np.linalg.norm(values, axis=1, keepdims=True)
    order = np.argsort(-(units @ units[vectors.names.index("clips/440.flac")]))[:3]
    assert [line.split(maxsplit=1)[1] for line in lines] == [vectors.names[i] for i in order]
    with pytest.raises(SystemExit):
        main(["search", str(index), "clip.wav", "-k", "0"])
    assert (
        main(["search", str(index), "clip.wav", "--encoder", "runs/aut_tiny/latest/export/whisper"])
        == 0
    )


def test_search_rejects_an_index_of_another_encoder_or_of_frames(
    in_pipeline_run: Path, encoder: AudioEncoder, tiny_whisper: Path
):
    index = SearchIndex(embed_paths(encoder, ["clips"], name=RUN))
    with pytest.raises(UserError, match="k must be at least 1, not -1"):
        index.nearest(index.units[0], k=-1)
    with pytest.raises(UserError, match="not the encoder that made the index"):
        index.open_encoder(path=str(tiny_whisper))
    with pytest.raises(UserError, match="without --frames"):
        SearchIndex(embed_paths(encoder, ["clips"], name=RUN, pooling=None))
