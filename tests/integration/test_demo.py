"""The page: what it shows is right, and it answers over HTTP as a browser would ask it."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.audio import encode_audio, tone
from whisper_aut.cli import main
from whisper_aut.errors import UserError
from whisper_aut.inference.chat import _generate, answer, stream
from whisper_aut.inference.demo import (
    DemoModels,
    _show_errors,
    build_page,
    launch_page,
    spectrogram,
)
from whisper_aut.loading import open_demo_models, open_run

RUN = "runs/aut_tiny/latest"


@pytest.fixture(scope="module")
def listener(pipeline_run: Path) -> DemoModels:
    opened = open_demo_models(str(pipeline_run / RUN), "", "none")
    opened.index(str(pipeline_run / "clips"))
    return opened


def complete_text(module: Any, clip: Path, domain: str, tokens: int = 64) -> str:
    """Write up to so many tokens at once."""
    (text,) = _generate(module, clip, domain, [tokens])
    return text


def test_a_run_has_before_after_and_a_decoder(listener: DemoModels, pipeline_run: Path):
    assert list(listener.encoders) == ["before", "after"]
    assert [encoder.padding for encoder in listener.encoders.values()] == ["none", "none"]
    assert not listener.takes_questions
    clip = pipeline_run / "clips" / "440.flac"
    found = listener.neighbours(str(clip), 2)
    assert list(found) == ["before", "after"]
    for neighbours in found.values():
        assert neighbours[0].name == str(clip)
        assert neighbours[0].similarity == pytest.approx(1, abs=1e-3)
        assert len(neighbours) == 2
    assert listener.encoders["before"].fingerprint() != listener.encoders["after"].fingerprint()
    *_, text = listener.text(str(clip), "music")
    assert text == complete_text(listener.module, clip, "music")
    with pytest.raises(UserError, match="takes no questions"):
        answer(listener.module, clip, "What?")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("batch_seconds", ["160", "0.5"])
def test_evaluate_answers_the_same_clip_by_clip(
    batch_seconds: str, in_pipeline_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    answers = [tmp_path / name for name in ("whole", "cut")]
    command = ["evaluate", RUN, "data/sound", "--limit", "5", "--out"]
    assert main([*command, str(answers[0])]) == 0
    assert main([*command, str(answers[1]), "--batch-seconds", batch_seconds]) == 0
    assert answers[0].read_text() == answers[1].read_text()
    assert capsys.readouterr().out.startswith("5 clips")


def test_a_run_is_opened_on_a_device_and_in_a_precision(in_pipeline_run: Path):
    module = open_run(Path(RUN), device="auto", dtype="bf16")
    assert {weight.dtype for weight in module.parameters()} == {torch.bfloat16}
    assert complete_text(module, Path("clip.wav"), "sound", 3) is not None
    listener = open_demo_models(RUN, "", None, dtype="bf16")
    assert {encoder.dtype for encoder in listener.encoders.values()} == {"bf16"}
    listener.index("clips", batch_seconds=1.0)
    assert main(["evaluate", RUN, "data/sound", "--limit", "2", "--dtype", "bf16"]) == 0
    with pytest.raises(UserError, match="Device 'cuda:99' cannot be used"):
        open_run(Path(RUN), device="cuda:99")


def test_a_text_grows_until_it_is_the_whole(listener: DemoModels, pipeline_run: Path):
    assert listener.module is not None
    clip = pipeline_run / "clip.wav"
    texts = list(stream(listener.module, clip, "sound", max_new_tokens=20))
    assert (
        texts
        == [complete_text(listener.module, clip, "sound", count) for count in (4, 8, 16, 20)][
            : len(texts)
        ]
    )


def test_maps_show_the_clip_among_those_of_shards(listener: DemoModels, pipeline_run: Path):
    shards = DemoModels(listener.encoders)
    folders = [str(pipeline_run / "data" / domain) for domain in ("sound", "music")]
    shards.index(*folders, str(pipeline_run / "clips"))
    index = shards.indexes["after"]
    query = str(pipeline_run / "clips" / "440.flac")
    before, after, layers = shards.maps(query).axes
    names = before.get_legend_handles_labels()[1]
    assert {"sound", "music", "clips", "this clip"} == set(names)
    star = after.collections[names.index("this clip")].get_offsets()
    mine = after.collections[names.index("clips")].get_offsets()
    assert np.isclose(mine, star, atol=1e-3).all(1).any()  # the clip is in the index too
    assert layers.lines[0].get_ydata()[0] == pytest.approx(1, abs=0.2)  # pyright: ignore
    sounds = [name for name in index.names if shards.group(name) == "sound"]
    assert len(sounds) > 1
    assert shards.notes[sounds[0]].text
    rate, samples = shards.audio(sounds[0])  # pyright: ignore[reportGeneralTypeIssues]
    assert (rate, np.asarray(samples).dtype) == (16_000, np.int16)
    assert np.abs(np.asarray(samples)).max() > 100
    assert shards.audio(query) == query


def test_an_index_may_have_one_clip_whose_key_has_a_colon(listener: DemoModels, tmp_path: Path):
    (tmp_path / "clip.wav").write_bytes(encode_audio(tone(1.0), kind="WAV"))
    write_tar(tmp_path / "0.tar", "a:b")
    one = DemoModels({"encoder": listener.encoders["after"]})
    one.index(str(tmp_path))
    assert isinstance(one.audio(one.indexes["encoder"].names[0]), tuple)
    (panel,) = one.maps(str(tmp_path / "clip.wav")).axes
    assert panel.collections[0].get_offsets().shape == (1, 2)


def test_evaluate_writes_keys_that_are_not_utf_8(in_pipeline_run: Path, tmp_path: Path):
    write_tar(tmp_path / "0.tar", "caf\udce9")
    out = tmp_path / "answers.jsonl"
    assert main(["evaluate", RUN, str(tmp_path), "--out", str(out)]) == 0
    assert json.loads(out.read_text())["key"] == "caf\udce9"


def write_tar(path: Path, key: str) -> None:
    content = {"flac": encode_audio(tone(1.0)), "json": b'{"text": "a", "domain": "sound"}'}
    with tarfile.open(path, "w", errors="surrogateescape") as tar:
        for suffix, body in content.items():
            member = tarfile.TarInfo(f"{key}.{suffix}")
            member.size = len(body)
            tar.addfile(member, io.BytesIO(body))


def test_a_folder_with_dollars_in_its_name_can_be_mapped(
    listener: DemoModels, pipeline_run: Path, tmp_path: Path
):
    shutil.copytree(pipeline_run / "clips", tmp_path / "$\\frac$")
    one = DemoModels({"encoder": listener.encoders["after"]})
    one.index(str(tmp_path))
    figure = one.maps(str(pipeline_run / "clip.wav"))
    assert len(figure.axes) == 1
    figure.savefig(tmp_path / "map.png")  # parses the labels


def test_an_encoder_alone_has_no_text(pipeline_run: Path):
    alone = open_demo_models(str(pipeline_run / RUN / "export" / "encoder"), "", "none")
    assert list(alone.encoders) == ["encoder"]
    with pytest.raises(UserError, match="writes no text"):
        next(alone.text(str(pipeline_run / "clip.wav"), "sound"))
    against = open_demo_models(
        str(pipeline_run / RUN / "export" / "encoder"),
        str(pipeline_run / RUN / "export" / "whisper"),
        "none",
    )
    assert list(against.encoders) == ["before", "after"]


def test_the_spectrogram_has_units_and_the_clips_length(pipeline_run: Path, tmp_path: Path):
    axes = spectrogram(str(pipeline_run / "clip.wav")).axes
    assert axes[0].get_xlim() == (0.0, 1.0)
    assert (axes[0].get_xlabel(), axes[1].get_ylabel()) == ("time / s", "dB below the peak")
    image = axes[0].images[0].get_array()
    assert image is not None
    assert float(image.max()) == 0.0
    (tmp_path / "bad.wav").write_text("no")
    with pytest.raises(UserError, match="cannot be used"):
        spectrogram(str(tmp_path / "bad.wav"))


@pytest.mark.slow
def test_the_page_answers_over_http(
    listener: DemoModels, pipeline_run: Path, free_port: int, tmp_path: Path
):
    gradio = pytest.importorskip("gradio")
    from gradio_client import Client, handle_file

    page = build_page(listener, "a test")
    with pytest.raises(gradio.Error, match="&lt;b&gt;"):  # which the page shows as HTML
        list(_show_errors(lambda clip: open_demo_models(clip, "", "none"))("./<b>"))
    address = launch_page(page, port=free_port, folders=[str(pipeline_run / "clips")])
    try:
        assert address.startswith("http://127.0.0.1:")
        client = Client(address, verbose=False)
        clip = handle_file(str(pipeline_run / "clips" / "880.flac"))
        shown = client.predict(clip, api_name="/neighbours")
        assert shown[0]["data"][0][1:] == ["clips", "", "880.flac"]
        assert "plot" in shown[-1]
        assert Path(shown[1]["value"]).stat().st_size > 1_000  # the clip itself, to be played
        *_, text = listener.text(str(pipeline_run / "clips" / "880.flac"), "sound")
        assert client.predict(clip, "sound", api_name="/text") == text
        assert "plot" in client.predict(clip, api_name="/spectrogram")
        (tmp_path / "silent.wav").write_bytes(encode_audio(0 * tone(1.0), kind="WAV"))
        with pytest.raises(Exception, match="silent audio"):
            client.predict(handle_file(str(tmp_path / "silent.wav")), "sound", api_name="/text")
        with pytest.raises(UserError, match="Choose another with --port"):
            launch_page(build_page(listener, "again"), port=free_port)
    finally:
        page.close()


def test_what_cannot_be_opened_is_said(
    pipeline_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(pipeline_run)
    assert main(["demo", "./nowhere"]) == 1
    assert "There is no model directory" in capsys.readouterr().err
    assert main(["demo", RUN, "--index", "nowhere"]) == 1
    assert "There is no file or folder nowhere" in capsys.readouterr().err
