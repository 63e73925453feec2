"""Write a model as a GGUF file for llama.cpp, and a Modelfile for Ollama: find → convert → write."""

if __name__ == "__main__":  # before the slow imports, so that Ctrl-C during them also prints just one line
    from support.errors import run_script

    run_script("export")

from pipeline.finished_model import find_finished_model
from settings import ExportSettings
from support.command_line import parse_command_line
from support.errors import check_one_process


def main() -> None:
    """Run the export.

    Raises:
        UserError: a problem that the user can fix.
    """
    settings = parse_command_line(ExportSettings)
    check_one_process("an export")
    found = find_finished_model(settings.model, settings.model_path)

    # Importing PyTorch takes a second, so check the options first.
    from pipeline.export import export_model

    export_model(found, settings.type, settings.output)
