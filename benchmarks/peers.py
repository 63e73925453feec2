"""The same jobs with transformers and peft, as their users would write them, with their fastest settings: fused
attention, fused AdamW, and bf16 on request. Usage: `peers.py TASK JSON`.
"""

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, GPT2Tokenizer, Trainer, TrainingArguments

from material import BUNDLED_DATA, SIDES, opening, read_dialogues, render
from measure import run_task
from ours import WARM_UP, generation_figures, loading_figures, step_figures

ALPHA = 16  # LoRA's alpha, the same as ours
CASES = 3


def load(folder: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model and tokenizer, as `Any`: their declared types are incomplete."""
    model = GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa", dtype=dtype)
    tokenizer = GPT2Tokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def encode(tokenizer: Any, path: Path, longest: int) -> list[list[int]]:
    """The dialogues of a file as token ids, truncated to `longest`."""
    texts = [render(turns) for turns in read_dialogues(path)]
    return [ids[:longest] for ids in tokenizer(texts)["input_ids"]]


def collate(examples: list[list[int]], padding_id: int) -> dict[str, Tensor]:
    """Token ids as (B, T) inputs and labels, padded on the right to the longest; transformers shifts the labels."""
    T = max(map(len, examples))
    ids = torch.tensor([example + [padding_id] * (T - len(example)) for example in examples])
    lengths = torch.tensor(list(map(len, examples)))
    mask = (torch.arange(T) < lengths[:, None]).long()  # (B, T)
    return {"input_ids": ids, "labels": ids.where(mask == 1, -100), "attention_mask": mask}


def main_job(folder: str, precision: str, epochs: int, new_tokens: int, device: str) -> dict[str, Any]:
    """The main job with the Trainer: evaluate at the same steps as ours, save the model, and generate three cases."""
    model, tokenizer = load(folder)
    encoded: Any = encode(tokenizer, BUNDLED_DATA, model.config.n_positions)
    cut = len(encoded) * 7 // 10
    arguments = TrainingArguments(
        output_dir="trainer",
        num_train_epochs=epochs,
        per_device_train_batch_size=2,
        learning_rate=5e-5,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=precision == "bf16",
        use_cpu=device == "cpu",
        dataloader_pin_memory=device == "cuda",
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=1,
        prediction_loss_only=True,
        report_to=[],
        disable_tqdm=True,
        seed=123,
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=lambda examples: collate(examples, tokenizer.pad_token_id),
        train_dataset=encoded[:cut],
        eval_dataset=encoded[cut:],
    )
    trainer.evaluate(encoded[:cut])
    trainer.evaluate()
    trainer.train()
    trainer.evaluate(encoded[:cut])
    trainer.save_model("model")
    tokenizer.save_pretrained("model")
    if precision == "bf16":
        model.bfloat16()  # faster than fp32 weights, and far faster than autocast
    texts = [opening(turns) for turns in read_dialogues(BUNDLED_DATA)[cut:][:CASES]]
    batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
    replies = complete(model, batch["input_ids"], batch["attention_mask"], new_tokens)
    print(*tokenizer.batch_decode(replies), sep="\n\n")
    return {"tokens_written": [len(reply) for reply in replies]}


def complete(model: Any, ids: Tensor, mask: Tensor, new_tokens: int) -> list[list[int]]:
    """Greedy continuations of (B, T) prompts, with exactly `new_tokens` tokens each."""
    model.eval()
    with torch.inference_mode():
        written = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            pad_token_id=model.config.eos_token_id,
        )
    return written[:, ids.size(1) :].tolist()


def training(
    folder: str, data: str, batch_size: int, steps: int, device: str, precision: str, lora_rank: int
) -> dict[str, Any]:
    """Time a plain loop over the first half of the dialogues in `data`, in random order, with padded batches."""
    model, tokenizer = load(folder)
    model = with_adapters(model, lora_rank) if lora_rank else model
    model.to(device).train()
    whole = encode(tokenizer, Path(data), model.config.n_positions + 1)
    encoded = [ids[:-1] for ids in whole[: len(whole) // SIDES]]  # the same inputs as ours: the last is only a target
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, weight_decay=0.1, fused=True)
    autocast = torch.autocast(device, dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    order = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(123)).tolist()
    seconds, lengths = [], []
    for start in range(0, batch_size * (WARM_UP + steps), batch_size):
        started = time.perf_counter()
        examples = [encoded[number] for number in order[start : start + batch_size]]
        batch = {name: value.to(device) for name, value in collate(examples, tokenizer.pad_token_id).items()}
        with autocast:
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - started)
        lengths.append([len(example) for example in examples])
    measured = [length for step in lengths[WARM_UP:] for length in step]
    return step_figures(seconds[WARM_UP:], measured, device)


def with_adapters(model: Any, rank: int) -> Any:
    """`model` with peft's adapters for the same matrices as ours."""
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=ALPHA,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
    )
    return get_peft_model(model, config)


def generation(folder: str, prompts: list[list[int]], new_tokens: int, device: str, precision: str) -> dict[str, Any]:
    """Time greedy completions of padded prompts, with weights in `precision`."""
    model, tokenizer = load(folder, torch.bfloat16 if precision == "bf16" else torch.float32)
    model.to(device)
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(device)

    def complete_all(count: int) -> list[list[int]]:
        return complete(model, batch["input_ids"], batch["attention_mask"], count)

    return generation_figures(complete_all, new_tokens, device)


def loading(folder: str) -> dict[str, Any]:
    """Time loading a model folder, without the imports."""
    return loading_figures(lambda: load(folder)[0])


def reading(folder: str, data: str) -> dict[str, Any]:
    """Time reading a file of dialogues into tokens, with one call of transformers' tokenizer."""
    tokenizer = GPT2Tokenizer.from_pretrained(folder)
    started = time.perf_counter()
    encoded = encode(tokenizer, Path(data), sys.maxsize)
    seconds = time.perf_counter() - started
    return {"dialogues_per_second": len(encoded) / seconds, "tokens": sum(map(len, encoded))}


if __name__ == "__main__":
    tasks = (main_job, training, generation, loading, reading)
    run_task({task.__name__: task for task in tasks}, sys.argv[1:])
