"""Tables that broke other tools, as their users reported it."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.audio import encode_audio, tone
from whisper_aut.audio.decode import ClipLimits, load_waveform
from whisper_aut.corpora.build import read_clip
from whisper_aut.corpora.manifest import Entry, Manifest, ManifestSpec


def entries(path: Path, text: str) -> list[Entry]:
    path.write_text(text, encoding="utf-8")
    found = list(Manifest(ManifestSpec(manifest=str(path))).entries())
    assert all(isinstance(one, Entry) for one in found)
    return [one for one in found if isinstance(one, Entry)]


def test_a_quote_that_a_sentence_of_common_voice_never_closes(tmp_path: Path):
    """pytorch/audio#2838: such a quote in a .tsv made one sentence of all the following lines."""
    rows = ['1.mp3\t"Hello, she said', "2.mp3\tfine", '3.mp3\tthe "end"']
    found = entries(tmp_path / "test.tsv", "path\tsentence\n" + "\n".join(rows) + "\n")
    texts = ['"Hello, she said', "fine", 'the "end"']
    assert [one.annotation.text for one in found] == texts


def test_the_word_null_is_a_transcript(tmp_path: Path):
    """huggingface/datasets#4467: in Luxembourgish, the spoken digit `null` became None."""
    found = entries(tmp_path / "digits.csv", "path,text\n0.wav,null\n1.wav,NA\n2.wav,nan\n")
    assert [one.annotation.text for one in found] == ["null", "NA", "nan"]


def test_the_duration_of_a_nemo_row_is_that_of_its_segment(tmp_path: Path):
    """NVIDIA-NeMo/Speech#10060: it was read as that of the recording, so later segments failed."""
    parts = [tone(1.0, rate) for rate in (300.0, 600.0, 900.0)]
    (tmp_path / "all.wav").write_bytes(encode_audio(np.concatenate(parts), kind="WAV"))
    row = {"audio_filepath": "all.wav", "text": "three", "offset": 2.0, "duration": 1.0}
    (entry,) = entries(tmp_path / "manifest.json", json.dumps(row) + "\n")
    clip = read_clip(entry.path, ClipLimits(), entry.segment)
    waveform = load_waveform(clip.audio, ClipLimits())
    assert waveform.numpy() == pytest.approx(parts[2], abs=1e-4)


def test_class_labels_of_minus_one_and_above_the_last_class(tmp_path: Path):
    """huggingface/datasets#5624: test splits without labels hold -1."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = {"info": {"features": {"label": {"names": ["dog", "cat"], "_type": "ClassLabel"}}}}
    table = pyarrow.table(
        {"path": ["0.wav", "1.wav", "2.wav"], "label": [1, -1, 7], "text": ["a", "b", "c"]}
    )
    metadata = {b"huggingface": json.dumps(names).encode()}
    parquet.write_table(table.replace_schema_metadata(metadata), tmp_path / "t.parquet")
    found = list(Manifest(ManifestSpec(manifest=str(tmp_path / "t.parquet"))).entries())
    assert [one.annotation.label for one in found if isinstance(one, Entry)] == ["cat", None, None]
