"""The loss curve of fifty steps equals that of transformers' Trainer, with its own accumulation and schedule."""

import numpy as np
import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from conftest import bundled_dialogues, fit, logged, tiny_reference, write_layout
from dialogues.batches import IGNORED, DialogueDataset
from dialogues.conversations import Conversations
from dialogues.template import Renderer
from load_gpt2_weights import load_model
from settings import TrainingSettings
from training.loop import all_steps

SETTINGS = TrainingSettings(
    epochs=17,
    max_steps=50,
    batch_size=2,
    gradient_accumulation=2,
    learning_rate=2e-3,
    schedule="linear",
    max_grad_norm=0.5,
)


class InOrder(Trainer):
    """A Trainer that takes the examples in the given order, as our loop does."""

    def _get_train_sampler(self, train_dataset=None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)


def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch padded on the right, with an attention mask, as transformers expects it."""
    longest = max(len(example["input_ids"]) for example in examples)
    padding = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
    return {
        name: torch.tensor([example[name] + [value] * (longest - len(example[name])) for example in examples])
        for name, value in padding.items()
    }


def test_fifty_steps_have_the_loss_curve_of_transformers(vocabulary, tmp_path):
    model, tokenizer = load_model(write_layout(tiny_reference(std=0.05), vocabulary, tmp_path / "m", "bare"))
    conversations = Conversations.of(Renderer(tokenizer), bundled_dialogues(), learn="replies")
    dataset = DialogueDataset(conversations, np.arange(7), 112)
    assert len(dataset) == 12  # three full steps per epoch
    fit(model, dataset, dataset, SETTINGS, tmp_path / "ours")

    taken = all_steps(dataset.lengths(), SETTINGS)
    numbers = [number for _ in range(50) for batch in next(taken) for number in batch]
    examples = [dataset[number] for number in numbers]
    rows = [
        {
            "input_ids": example.tokens.tolist(),
            "labels": np.where(example.learned, example.tokens.astype(np.int64), IGNORED).tolist(),
            "attention_mask": [1] * len(example.tokens),
        }
        for example in examples
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=2e-3,
        lr_scheduler_type="linear",
        weight_decay=0.1,
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = InOrder(tiny_reference(std=0.05), arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    ours = logged(tmp_path / "ours", "train_loss")
    assert len(ours) == len(theirs) == 50
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours[0] - ours[-1] > 1
