"""The Hugging Face recipe as a script: `Seq2SeqTrainer` over the demo corpus for one epoch. The
other side of `epoch.py`.

Audio is decoded and features are made in a loader's worker, clips padded to 30 s, labels to the
longest, as in the Whisper fine-tuning guide. Prints the number of clips and steps as JSON.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from demo import LIMITS, MIXTURE
from torch.utils.data import Dataset
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from whisper_aut.audio.decode import load_waveform
from whisper_aut.data.reader import Sample
from whisper_aut.data.shards import iter_samples, open_index

IGNORED = -100


class DemoClips(Dataset[dict[str, Any]]):
    """The demo corpus in AuT's shares, decoded when asked for."""

    def __init__(self, corpus: Path, model: str, clips: int):
        self.extractor, self.tokenizer = (
            WhisperFeatureExtractor.from_pretrained(model),
            WhisperTokenizer.from_pretrained(model),
        )
        self.samples: list[Sample] = []
        for domain, tenths in MIXTURE.items():
            items = iter_samples(open_index(corpus / "train" / domain), LIMITS)
            found = [item for item in items if isinstance(item, Sample)]
            self.samples += (found * clips)[: clips * tenths // 10]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        sample = self.samples[number]
        array = load_waveform(sample.audio, LIMITS).numpy()
        features = self.extractor(array, sampling_rate=16_000, return_tensors="pt").input_features[
            0
        ]
        return {
            "input_features": features,
            "labels": self.tokenizer(sample.annotation.text).input_ids,
        }


class Collator:
    """Pads labels to the longest of the batch; the model shifts them itself."""

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(item["labels"]) for item in items)
        labels = [
            item["labels"][1:] + [IGNORED] * (longest - len(item["labels"])) for item in items
        ]
        return {
            "input_features": torch.stack([item["input_features"] for item in items]),
            "labels": torch.tensor(labels),
        }


def run(corpus: Path, model: str, clips: int, batch: int) -> dict[str, int]:
    whisper = WhisperForConditionalGeneration.from_pretrained(model)
    data = DemoClips(corpus, model, clips)
    with TemporaryDirectory() as folder:
        arguments = Seq2SeqTrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            num_train_epochs=1,
            learning_rate=1e-4,
            dataloader_num_workers=1,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        )
        trainer = Seq2SeqTrainer(
            model=whisper, args=arguments, train_dataset=data, data_collator=Collator()
        )
        trainer.train()
        whisper.save_pretrained(folder)  # the other side saves and exports too
    return {"clips": len(data), "steps": trainer.state.global_step}


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
