"""A patched decoder-only model inside Seq2SeqTrainer(predict_with_generate=True): stock's metrics, stock's training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from stock import snapshot
from torch.utils.data import Dataset
from transformers import GenerationConfig, PreTrainedModel, Seq2SeqTrainer, Seq2SeqTrainingArguments

import hf_paged
import zoo

NEW = 10


class Rows(Dataset):
    """Prompts of different lengths; the labels are what follows, as a chat's last answer would."""

    def __init__(self, count: int, seed: int) -> None:
        self.prompts = zoo.prompts(seed, [4 + i * 5 % 13 for i in range(count)])
        self.answers = zoo.prompts(seed + 1, [NEW] * count)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"prompt": self.prompts[index], "answer": self.answers[index]}


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Prompt and answer for training and the loss; left-padded, so that what is generated follows the text."""
    texts = [row["prompt"] for row in rows]
    width = max(map(len, texts))
    ids = torch.tensor([[zoo.PAD] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def metrics(prediction: Any) -> dict[str, float]:
    """A digest of every generated token."""
    ids = numpy.where(prediction.predictions < 0, zoo.PAD, prediction.predictions)
    weights = numpy.arange(1, ids.shape[1] + 1)
    return {
        "digest": float((ids * weights).sum()),
        "width": float(ids.shape[1]),
        "distinct": float(len(numpy.unique(ids))),
    }


def train(model: PreTrainedModel, folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Two epochs of two steps, with an evaluation after each step: the log, and the weights at the end."""
    args = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=5,
        learning_rate=3e-3,
        eval_strategy="steps",
        eval_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        predict_with_generate=True,
        generation_config=GenerationConfig(
            max_new_tokens=NEW, do_sample=False, pad_token_id=zoo.PAD, eos_token_id=zoo.EOS
        ),
        use_cpu=True,
        seed=11,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=Rows(16, 5),
        eval_dataset=Rows(12, 9),
        data_collator=collate,
        compute_metrics=metrics,
    )
    trainer.train()
    kept = ("loss", "grad_norm", "eval_loss", "eval_digest", "eval_width", "eval_distinct")
    log = [{name: entry[name] for name in kept if name in entry} for entry in trainer.state.log_history]
    return log, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("keep", [False, True], ids=["patch", "paged"])
def test_seq2seq_trainer(tmp_path: Path, keep: bool) -> None:
    reference = zoo.build("llama")
    log, weights = train(reference, tmp_path)
    assert len({entry["eval_digest"] for entry in log if "eval_digest" in entry}) == 4  # training changes the answers
    assert all(entry["eval_width"] > NEW for entry in log if "eval_width" in entry)

    model = zoo.build("llama")
    if keep:
        with hf_paged.paged(model, on_unsupported="error") as handle:
            got, got_weights = train(model, tmp_path)
            assert handle.stats.pool_bytes > 0
            used = handle.stats.used_tokens
    else:
        handle = hf_paged.patch(model, on_unsupported="error")
        got, got_weights = train(model, tmp_path)
        used = handle.stats.used_tokens
    assert handle.stats.pool_bytes == 0
    assert used > 4 * 12 * NEW  # it did run on the engine
    hf_paged.unpatch(model)

    assert got == log
    assert got_weights.keys() == weights.keys()
    assert all(torch.equal(got_weights[name], weights[name]) for name in weights)
    assert snapshot(model)["config "] == snapshot(reference)["config "]
    assert "generate" not in vars(model)
