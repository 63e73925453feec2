"""Measure this program from inside: training steps, generation, loading and reading. Each task runs in its own process.
Usage: `ours.py TASK JSON`.
"""

import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from measure import run_task

WARM_UP = 2  # number of initial steps to leave out: they compile kernels and touch memory


def training(folder: str, data: str, steps: int, device: str, precision: str, **options: Any) -> dict[str, Any]:
    """Time the steps of a run's training loop over the first half of the dialogues in `data`.

    Args:
        options: fields of `TrainingSettings`.

    Returns:
        The figures of the measured steps; see `step_figures`.
    """
    from dialogues.batches import epoch_steps
    from pipeline.prepare import make_datasets, open_data, read_data
    from pipeline.train import make_model
    from settings import DataSettings, RunSettings, TrainingSettings
    from training.checkpoint import Checkpoints
    from training.defaults import complete
    from training.device import choose_machine, keep_freed_memory
    from training.loop import Examples, Trainer, TrainingSetup
    from training.optimizer import make_optimizer

    keep_freed_memory()
    machine = choose_machine(device, precision)
    settings = TrainingSettings(**options)
    settings = complete(settings, parameters=1 << 30)
    read = read_data(open_data(DataSettings((Path(data),))), Path(folder), DataSettings(split="50/50"), settings.seed)
    tokenizer = read.conversations.renderer.tokenizer
    model = make_model(Path(folder), settings, tokenizer, machine)
    datasets = make_datasets(read, 0, model.config.n_positions)
    examples = Examples(datasets["train"], datasets["val"], tokenizer.eot_token)
    checkpoints = Checkpoints(Path("checkpoint").resolve(), {})
    optimizer = make_optimizer(model, settings)
    setup = TrainingSetup(model, optimizer, examples, settings, RunSettings(), machine, checkpoints)
    trainer = Trainer(setup)
    lengths = [length - 1 for length in examples.train.lengths()]  # the last token is only a target
    seconds, numbers = [], []
    for step in islice(epoch_steps(lengths, settings.batch_size, 1, settings.seed, 0), WARM_UP + steps):
        started = time.perf_counter()
        trainer.step(step)
        seconds.append(time.perf_counter() - started)
        numbers.append([number for batch in step for number in batch])
    measured = [number for step in numbers[WARM_UP:] for number in step]
    return step_figures(seconds[WARM_UP:], [lengths[number] for number in measured], device)


def step_figures(seconds: list[float], lengths: list[int], device: str) -> dict[str, Any]:
    """The training-step figures that we and the peers report.

    Args:
        lengths: input tokens of every example, without padding.
    """
    tokens = sum(lengths)
    return {
        "tokens_per_second": tokens / sum(seconds),
        "mean_length": tokens / len(lengths),
        "step_seconds": seconds,
        **gpu_memory(device),
    }


def gpu_memory(device: str) -> dict[str, Any]:
    """The peak memory of tensors on the GPU; empty on a CPU, where the system measures the peak."""
    if device != "cuda":
        return {}
    import torch

    return {"gpu_peak_bytes": torch.cuda.max_memory_allocated()}


def generation(folder: str, prompts: list[list[int]], new_tokens: int, device: str) -> dict[str, Any]:
    """Time completions as in a run, with greedy decoding and without an end token."""
    from load_gpt2_weights import load_model
    from settings import GenerationSettings
    from talking.decoder import Decoder
    from talking.generation import Bounds, generate
    from training.device import choose_machine, keep_freed_memory

    keep_freed_memory()
    machine = choose_machine(device, "auto")
    model = load_model(Path(folder), dtype=machine.inference_dtype)[0].to(device)
    decoder = Decoder(model, machine.inference_dtype)

    def complete(count: int) -> list[list[int]]:
        settings = GenerationSettings(max_new_tokens=count)
        return generate(decoder, prompts, Bounds(-1), settings, 0)

    return generation_figures(complete, new_tokens, device)


def generation_figures(complete: Callable[[int], list[list[int]]], new_tokens: int, device: str) -> dict[str, Any]:
    """After a warm-up call, time `complete(n)`, which returns n new tokens for each prompt."""
    complete(2)
    started = time.perf_counter()
    complete(1)
    first = time.perf_counter() - started
    started = time.perf_counter()
    replies = complete(new_tokens)
    seconds = time.perf_counter() - started
    written = sum(map(len, replies))
    assert written == new_tokens * len(replies), f"{written} tokens were written for {len(replies)} prompts"
    return {"first_token_seconds": first, "tokens_per_second": written / seconds, **gpu_memory(device)}


def count_written(folder: str, data: str, new_tokens: int, device: str, precision: str) -> dict[str, Any]:
    """The number of tokens that a finished run generated for each case; greedy decoding reproduces its text."""
    from load_gpt2_weights import load_model
    from pipeline.prepare import open_data, read_data
    from settings import DataSettings, GenerationSettings
    from talking.decoder import Decoder
    from talking.generation import Bounds, choose_turn, generate
    from training.device import choose_machine

    machine = choose_machine(device, precision)
    model, tokenizer = load_model(Path(folder), dtype=machine.inference_dtype)
    settings = GenerationSettings(max_new_tokens=new_tokens)
    read = read_data(open_data(DataSettings((Path(data),))), Path(folder), DataSettings(), 0)
    renderer = read.conversations.renderer
    dialogues = [read.conversations[number] for number in read.held_out[: settings.cases]]
    prompts = [renderer.encode_prompt(dialogue, choose_turn(renderer, dialogue, "all")) for dialogue in dialogues]
    decoder = Decoder(model.to(device), machine.inference_dtype)
    replies = generate(decoder, prompts, Bounds(tokenizer.eot_token, renderer.newest_turns), settings, 0)
    return {"tokens_written": [len(reply) for reply in replies]}


def loading(folder: str) -> dict[str, Any]:
    """Time loading a model folder, without the imports."""
    from load_gpt2_weights import load_model
    from training.device import keep_freed_memory

    keep_freed_memory()
    return loading_figures(lambda: load_model(Path(folder))[0])


def loading_figures(load: Callable[[], Any]) -> dict[str, Any]:
    """Time `load()`, which returns a model, and one read of every weight, because some loaders only map the file."""
    started = time.perf_counter()
    for parameter in load().parameters():
        parameter.sum().item()
    return {"load_seconds": time.perf_counter() - started}


def reading(folder: str, data: str) -> dict[str, Any]:
    """Time reading a file of dialogues into tokens, with the split."""
    from pipeline.prepare import open_data, read_data
    from settings import DataSettings

    started = time.perf_counter()
    read = read_data(open_data(DataSettings((Path(data),))), Path(folder), DataSettings(), 0)
    seconds = time.perf_counter() - started
    return {"dialogues_per_second": len(read.conversations) / seconds, "tokens": len(read.conversations.tokens)}


if __name__ == "__main__":
    tasks = (training, generation, count_written, loading, reading)
    run_task({task.__name__: task for task in tasks}, sys.argv[1:])
