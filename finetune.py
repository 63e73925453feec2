"""Fine-tune GPT-2 on conversations: read → load → train → generate → measure → write."""

if __name__ == "__main__":  # before the slow imports, so that Ctrl-C during them also prints just one line
    from support.errors import run_script

    run_script("finetune")

import contextlib
import time
from typing import TYPE_CHECKING

from pipeline.job import Job, RunFacts
from pipeline.run_settings import as_arguments, parse_finetune_settings, read_facts
from settings import FinetuneSettings, ModelSettings, TrainingSettings
from support.errors import command_for, display
from support.files import write_json
from support.screen import lasting_screen

if TYPE_CHECKING:
    from pipeline.train import OpenRun
    from talking.decoder import Decoder
    from talking.generation import Case

NEXT_STEP = """
This was the small bundled model, for practice.
GPT-2 with 355M parameters (a 1.5 GB download) should write much better:"""


def main() -> None:
    settings = parse_finetune_settings()
    facts = read_facts(settings.run.resume)
    # If the output is closed, a training run continues, but a preview, which is only output, ends.
    with contextlib.nullcontext() if settings.preview else lasting_screen():
        if settings.data.try_ != "nothing":
            from pipeline.rates import try_rates

            try_rates(settings, finetune)
        elif settings.data.folds and not facts.fold:
            from pipeline.folds import cross_validate

            cross_validate(settings, finetune)
        else:
            finetune(settings, facts)


def finetune(settings: FinetuneSettings, facts: RunFacts) -> None:
    """Train and evaluate one model, or with `--preview` only show its training data.

    Raises:
        UserError: a problem that the user can fix.
    """
    # Import late, so that `--help` and errors in options appear at once.
    from hub.find import BUNDLED
    from pipeline.prepare import prepare_job

    started = time.perf_counter()
    job = prepare_job(settings, facts)
    if settings.preview:
        return
    # Importing PyTorch takes a second, so check the options and the data first.
    from pipeline.measure import measure_base, measure_run
    from pipeline.subject import subject_of_run
    from pipeline.train import finished_decoder, open_run, train_model
    from training.progress import show_losses

    with open_run(job) as run:
        subject = subject_of_run(run)  # the held-out conversations used for measuring
        base = measure_base(run, subject)
        state = train_model(run)
        if not job.machine.primary:
            return  # under torchrun, one process does the rest
        decoder = finished_decoder(run)
        cases = complete_cases(run, decoder)
        display(show_losses(state))
        report = measure_run(run, subject, base, decoder, cases)
        written = write_cases(run.job, cases)
    seconds = time.perf_counter() - started
    display(f"\n{written}; model: {run.folder / 'model'}; report: {report}; {seconds:.0f} s in total")
    if job.source.resolve() == BUNDLED and not facts.fold:
        larger = FinetuneSettings(ModelSettings("gpt2-medium"), settings.data, TrainingSettings(lora_rank=8))
        display(NEXT_STEP, f"{command_for()} {as_arguments(larger)}")


def complete_cases(run: "OpenRun", decoder: "Decoder") -> "list[Case]":
    """Complete the held-out conversations with the model, and print generated and true replies side by side."""
    from talking.generation import CompletionConfig, complete_dialogues

    job, generation = run.job, run.job.settings.generation
    renderer = job.data.conversations.renderer
    dialogues = [job.data.conversations[number] for number in job.data.held_out[: generation.cases]]
    config = CompletionConfig(renderer, job.settings.data.learn, generation, job.seed)
    cases = complete_dialogues(decoder, dialogues, config)
    print_cases([case.as_texts(renderer.name) for case in cases], generation.cases)
    return cases


def write_cases(job: Job, cases: "list[Case]") -> str:
    """Write generated and true conversations side by side; return a message with the file's location."""
    from pipeline.run_folder import OUTPUT

    texts = [case.as_texts(job.data.conversations.renderer.name) for case in cases]
    output = job.settings.output
    replaced = "replaced" if output.exists() else "written"
    write_json(output, texts)
    write_json(job.folder / OUTPUT, texts)  # written last: its presence marks a finished run
    return f"{replaced}: {output}"


def print_cases(cases: list[dict[str, str]], wanted: int) -> None:
    """Print generated and true conversations side by side."""
    if len(cases) < wanted:
        display(f"--cases {wanted}: only {len(cases)} available")
    for number, case in enumerate(cases, 1):
        display(f"\ncase {number}\n  input      {case['input']}\n  true       {case['response']}")
        display(f"  generated  {case['model_response']}")
