"""The audit on recordings: 200 ESC-10 clips, each altered in one way, hidden among 3,000 others;
what it finds and what it takes.

`python benchmarks/audit.py --data FOLDER [--seed N] [--json FILE]`; FOLDER holds esc10/, fsdd/,
gmnotes/ and gmpieces/. Probe set: the 200 clips as published. Others: ESC-10 clips of other
uploads, and clips of the three other corpora. A cut is of 3 to 5 s, drawn anywhere that holds at
least a hundredth of the energy of the clip's loudest cut as long: what is silent cannot be told
from other silence. No names are shared, so that only hashes and sound can find anything.
"""

import argparse
import io
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import soundfile
import soxr

from whisper_aut.corpora.audit import ShardResult, read_clip_metadata, run_audit
from whisper_aut.data.annotation import Annotation
from whisper_aut.data.shards import open_index
from whisper_aut.data.writer import ShardWriter

HIDDEN, OTHERS = 200, 3_000
RATES_HZ = (8_000, 16_000, 22_050, 32_000, 48_000)
MP3_LEVEL = {
    8_000: 0.9,
    16_000: 0.6,
    22_050: 0.6,
    32_000: 0.8,
    44_100: 0.88,
    48_000: 0.88,
}  # libsndfile's for about 64 kb/s
KINDS = ("MP3 64 kb/s", "Ogg", "resampled", "resampled, MP3", "resampled, Ogg")
# Uploads of one recording under two Freesound ids, which waveforms confirm (cross-correlation 0.90
# and more over a second).
SAME_RECORDING = {"151085": "151080", "30322": "28314"}

Samples = tuple[np.ndarray, int]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not (options.data / "esc10" / "audio").is_dir():
        sys.exit(f"{options.data} holds no esc10/audio")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        kinds = write_corpora(options.data, root, np.random.default_rng(options.seed))
        started = time.process_time()
        audit = run_audit(
            [str(root / "train")], [str(root / "probe")], root / "out", workers=1, progress=False
        )
        seconds = time.process_time() - started
        figures = score(audit, *kinds) | {"seed": options.seed, **cost(audit, seconds, root)}
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def write_corpora(
    data: Path, root: Path, generator: np.random.Generator
) -> tuple[dict[str, str], list[str]]:
    """Write both sides; return how each hidden clip was altered, and each one's recording."""
    uploads: dict[str, list[Path]] = defaultdict(list)
    for file in sorted((data / "esc10" / "audio").iterdir()):
        upload = file.name.split("-")[1]
        uploads[SAME_RECORDING.get(upload, upload)].append(file)
    order = [uploads[name] for name in generator.permutation(sorted(uploads))]
    chosen: list[Path] = []
    while len(chosen) < HIDDEN:
        chosen += order.pop()
    chosen = chosen[:HIDDEN]  # the last upload's further clips, if any, stand on neither side
    others = [file for group in order for file in group]
    more = [
        file
        for name in ("gmnotes", "gmpieces", "fsdd")
        for file in sorted((data / name / "audio").iterdir())
    ]
    kinds = {}
    with (
        ShardWriter(root / "probe") as probe,
        ShardWriter(root / "train", max_bytes=16 << 20) as train,
    ):
        for number, file in enumerate(chosen):
            probe.write(f"probe{number}", "ogg", file.read_bytes(), Annotation(text="-"))
        for number, file in enumerate([*others, *more][:OTHERS]):
            train.write(f"other{number}", file.suffix[1:], file.read_bytes(), Annotation(text="-"))
        for number, file in enumerate(chosen):
            kind = KINDS[number % len(KINDS)]
            suffix, audio = altered(soundfile.read(file, dtype="float32"), kind, generator)
            train.write(f"hidden{number}", suffix, audio, Annotation(text="-"))
            kinds[f"hidden{number}"] = kind
    recordings = [
        SAME_RECORDING.get(name, name) for name in (file.name.split("-")[1] for file in chosen)
    ]
    return kinds, recordings


def altered(source: Samples, kind: str, generator: np.random.Generator) -> tuple[str, bytes]:
    """Cut, change the gain by -20 to +6 dB (without clipping), and resample or encode."""
    samples, rate = cut(source, generator)
    if "resampled" in kind:
        target = int(generator.choice(RATES_HZ))
        samples, rate = soxr.resample(samples, rate, target), target
    samples = samples * min(10 ** (generator.uniform(-20, 6) / 20), 0.99 / np.abs(samples).max())
    buffer = io.BytesIO()
    if "MP3" in kind:
        soundfile.write(
            buffer,
            samples,
            rate,
            format="MP3",
            bitrate_mode="CONSTANT",
            compression_level=MP3_LEVEL[rate],
        )
        return "mp3", buffer.getvalue()
    if "Ogg" in kind:
        soundfile.write(
            buffer, samples, rate, format="OGG", subtype="VORBIS", compression_level=0.9
        )
        return "ogg", buffer.getvalue()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="PCM_16")
    return "wav", buffer.getvalue()


def cut(source: Samples, generator: np.random.Generator) -> Samples:
    samples, rate = source
    length = min(len(samples), round(generator.uniform(3, 5) * rate))
    energy = np.concatenate([[0], np.cumsum(np.square(samples, dtype=np.float64))])
    of_cuts = energy[length:] - energy[:-length]
    start = int(generator.choice(np.flatnonzero(of_cuts >= of_cuts.max() / 100)))
    return samples[start : start + length], rate


def score(audit: dict, kinds: dict[str, str], recordings: list[str]) -> dict:
    """Return recall by kind, every false pair, and the number of pairs of two takes."""
    found, false, takes = set(), [], 0
    for match in audit["matches"]:
        train_key, probe_key = match["train"]["key"], match["probe"]["key"]
        probe = int(probe_key.removeprefix("probe"))
        hidden = int(train_key.removeprefix("hidden")) if "hidden" in train_key else -1
        if hidden == probe:
            found.add(train_key)
        elif hidden >= 0 and recordings[hidden] == recordings[probe]:
            takes += 1
        else:
            false.append([train_key, probe_key, match["evidence"]])
    table = {}
    for kind in KINDS:
        clips = [key for key, own in kinds.items() if own == kind]
        table[kind] = {"hidden": len(clips), "found": len(found & set(clips))}
    return {
        "recall": len(found) / len(kinds),
        "by_kind": table,
        "missed": sorted(set(kinds) - found),
        "false": false,
        "takes_of_one_recording": takes,
    }


def cost(audit: dict, seconds: float, root: Path) -> dict:
    """Return CPU seconds per hour of audio: the whole audit, and reading and hashing alone."""
    hours = (sum(folder["seconds"] for folder in (*audit["train"], *audit["probes"]))) / 3600
    index = open_index(root / "train")
    started, result = time.process_time(), ShardResult()
    for shard in index.shards:
        for _ in read_clip_metadata((index.root, shard.name), result):
            pass
    reading = (time.process_time() - started) / (result.seconds / 3600)
    return {
        "hours": round(hours, 3),
        "core_seconds_per_hour": round(seconds / hours, 1),
        "of_these_without_search": round(reading, 1),
    }


if __name__ == "__main__":
    main()
