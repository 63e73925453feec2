"""A run's `settings.json`: write everything that determines the run, read it, and compare it on `--resume`."""

import json
import math
import operator
import shlex
import sys
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dialogues.inputs import PIPE, is_pipe
from pipeline.job import RunFacts
from pipeline.run_folder import SETTINGS
from settings import DataSettings, FinetuneSettings
from support.command_line import check_settings, parse_command_line
from support.errors import UserError, display
from support.files import Json, read_json_object, write_json

# Options that no longer exist, by group, with their defaults.
RETIRED: dict[str, dict[str, object]] = {
    "training": {"padding_free": False, "shard": False},
    "run": {"resume_inexactly": False},
}
FACTS = {"data": "fold", "training": "processes"}  # groups in which older versions stored these facts
OPTIONS = {"name": "model", "paths": "data", "try_": "try"}  # fields whose options have different names
ADVICE = "restore it, or start a new run"
# Options that may change on --resume, in addition to --model-path, saving, and everything after training.
FREE = ("paths", "device", "precision")  # the data and the machine that result from these are compared instead
ADAPTED = ("learning_rate", "epochs")  # options whose defaults depend on the model or on LoRA
EXTENDED = ("epochs", "max_steps")  # options that may increase


@dataclass(frozen=True)
class Record:
    """Everything that determines a run apart from its options; recorded in `settings.json`."""

    facts: RunFacts
    machine: dict[str, str | int]  # everything that can change the last bits of a result
    fingerprints: dict[str, str]  # hashes of the conversations and the base model


RECORDED = {field.name for field in fields(Record)}  # keys of settings.json that are not options


def write_settings(folder: Path, settings: FinetuneSettings, source: Path, record: Record) -> None:
    """Write everything that determines a run: every option, with absolute paths, and its `record`.

    Args:
        source: the model folder that was found for `--model`.
    """
    paths = tuple(PIPE if is_pipe(path) else path.absolute() for path in settings.data.locate())
    data = replace(settings.data, paths=paths)
    model = replace(settings.model, model_path=settings.model.model_path.absolute())
    if Path(model.name).resolve() in (source.resolve(), source.resolve().parent):  # a path, not a known name
        model = replace(model, name=str(Path(model.name).absolute()))
    run = replace(settings.run, run_dir=None, resume=None, settings=None)
    absolute = replace(settings, data=data, model=model, run=run, output=settings.output.absolute())
    write_json(folder / SETTINGS, {**asdict(absolute), **asdict(record)})


def parse_finetune_settings(arguments: list[str] | None = None) -> FinetuneSettings:
    """Parse the command line; with `--resume`, return the settings of that run with the permitted changes.

    Raises:
        UserError: an invalid option, a folder without a run, or an option that would change the run's result.
    """
    typed = parse_command_line(FinetuneSettings, arguments, check=False)
    check_settings(typed.run)
    if typed.run.settings:
        default = read_defaults(typed.run.settings)
        settings = parse_with_defaults(arguments, default)
        warn_of_inherited(default, settings)
        return settings
    if typed.run.resume is None:
        check_settings(typed)
        return typed
    recorded = read_settings(typed.run.resume)
    if PIPE in recorded.data.paths and typed.data.paths == DataSettings.paths:
        raise UserError(
            f"--resume {typed.run.resume}: its conversations came from a pipe, and no copy was kept; give them"
            " again with --data"
        )
    try:
        settings = parse_with_defaults(arguments, recorded)
    except (TypeError, AttributeError) as error:
        raise unknown_settings(typed.run.resume, error) from None
    if settings.preview:
        raise UserError("--preview needs a new run; leave out --resume")
    if problems := [*settings.problems(), *changed_options(recorded, settings)]:
        raise UserError(
            f"{typed.run.resume} can't be resumed with {'; '.join(problems)}; correct these options or start a new run"
        )
    return settings


def parse_with_defaults(arguments: list[str] | None, default: FinetuneSettings) -> FinetuneSettings:
    """Parse the command line; a flag is set if it is set there or in `default`."""
    settings = parse_command_line(FinetuneSettings, arguments, default=map_switches(lambda *_: False, default))
    return map_switches(operator.or_, settings, default)


def map_switches(function: Callable[..., bool], *settings: Any) -> Any:
    """Return the first of `settings` with each boolean field replaced by `function` of its values in all of them."""
    changes = {}
    for field in fields(settings[0]):
        values = [getattr(each, field.name) for each in settings]
        if is_dataclass(values[0]):
            changes[field.name] = map_switches(function, *values)
        elif isinstance(values[0], bool):
            changes[field.name] = function(*values)
    return replace(settings[0], **changes)


def read_settings(folder: Path) -> FinetuneSettings:
    """Read the settings of the run in `folder`; options newer than the run get their defaults.

    Raises:
        UserError: there is no run, or its settings have options that this version does not know.
    """
    if not (folder / SETTINGS).is_file():
        raise UserError(f"--resume {folder}: no {SETTINGS} there; give a run folder, such as runs/tiny-1")
    try:
        return read_options(folder / SETTINGS, ADVICE)
    except (TypeError, AttributeError, ValueError) as error:
        raise unknown_settings(folder, error) from None


def read_options(path: Path, advice: str) -> FinetuneSettings:
    """Read the options in a `settings.json`, even of an older version.

    Raises:
        UserError: the file can't be read; `advice` says how to fix it.
        TypeError, AttributeError, ValueError: it has an unknown option or a wrong value.
    """
    recorded = read_json_object(path, advice)
    if isinstance(data := recorded.get("data"), dict) and "path" in data:  # older versions read a single file
        data["paths"] = [data.pop("path")]
    if retired := drop_retired(recorded):
        display(f"{path}: options that no longer exist are ignored: {', '.join(retired)}", file=sys.stderr)
    return from_json(FinetuneSettings, {name: value for name, value in recorded.items() if name not in RECORDED})


def read_defaults(path: Path) -> FinetuneSettings:
    """Read the file of `--settings`: the settings of a run, or some of them.

    Raises:
        UserError: the file can't be read, or has an unknown setting or a wrong value.
    """
    try:
        return read_options(path, "correct it, or leave out --settings")
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError(f"--settings {path}: {error}") from None


def warn_of_inherited(default: FinetuneSettings, settings: FinetuneSettings) -> None:
    """Print the values of `--settings` whose own defaults depend on the model and on LoRA, if one of these changes."""
    changed = ["--model"] * (settings.model.name != default.model.name)
    changed += ["--lora-rank"] * (bool(settings.training.lora_rank) != bool(default.training.lora_rank))
    kept = [
        f"--{option_name(name)} {value}"
        for name in ADAPTED
        if (value := getattr(settings.training, name)) is not None and value == getattr(default.training, name)
    ]
    if changed and kept:
        display(f"{' and '.join(changed)} changed; kept from {settings.run.settings}: {', '.join(kept)}")


def option_name(field: str) -> str:
    return OPTIONS.get(field, field.replace("_", "-"))


def as_arguments(settings: Any) -> str:
    """Return the command-line options that give these settings, without those at their defaults."""
    found = []
    for field in fields(settings):
        value, name = getattr(settings, field.name), option_name(field.name)
        if is_dataclass(value):
            found.append(as_arguments(value))
        elif value != field.default:
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            found.append(shlex.join([f"--{name}", *map(str, values)]))
    return " ".join(filter(None, found))


def drop_retired(recorded: Json) -> list[str]:
    """Remove the options that no longer exist from a `settings.json`, in place; return those not at their defaults."""
    used = []
    for group, name in FACTS.items():
        if isinstance(values := recorded.get(group), dict):
            values.pop(name, None)
    for group, defaults in RETIRED.items():
        if isinstance(values := recorded.get(group), dict):
            found = {name: values.pop(name, default) for name, default in defaults.items()}
            used += [f"--{option_name(name)} {found[name]}" for name in found if found[name] != defaults[name]]
    return used


def read_fingerprints(folder: Path) -> dict[str, str]:
    """Read the fingerprints of the conversations and the base model of the run in `folder`."""
    recorded = read_json_object(folder / SETTINGS, ADVICE).get("fingerprints")
    return recorded if isinstance(recorded, dict) else {}


def read_facts(folder: Path | None) -> RunFacts:
    """Return the facts about the start of the run in `folder`; for None, those of a new run."""
    if folder is None:
        return RunFacts()
    recorded = read_json_object(folder / SETTINGS, ADVICE)
    found = recorded.get("facts")
    if found is None:  # written by an older version
        groups = {group: values for group in FACTS if isinstance(values := recorded.get(group), dict)}
        found = {name: groups[group][name] for group, name in FACTS.items() if name in groups.get(group, {})}
    try:
        return from_json(RunFacts, found)
    except (TypeError, AttributeError, ValueError) as error:
        raise unknown_settings(folder, error) from None


def unknown_settings(folder: Path, error: Exception) -> UserError:
    return UserError(f"{folder / SETTINGS}: settings of another version of the program ({error})")


def from_json(kind: Any, values: Json) -> Any:
    """Rebuild a settings dataclass from the output of `asdict`, after a round trip through JSON.

    Raises:
        TypeError, AttributeError, ValueError: `values` has a different structure.
    """
    types = get_type_hints(kind)
    if unknown := values.keys() - types.keys():
        raise ValueError("; ".join(f"there is no setting {name}{nearest(name, kind)}" for name in sorted(unknown)))
    made = {}
    for field in fields(kind):
        if field.name not in values:
            if field.default is MISSING and field.default_factory is MISSING:
                raise ValueError(f"{field.name} is missing")
            continue
        value, type_ = values[field.name], types[field.name]
        if not fits(value, type_):
            raise ValueError(f"{field.name} can't be {value!r}")
        if is_dataclass(type_):
            made[field.name] = from_json(type_, value)
        elif isinstance(value, list):
            made[field.name] = tuple(map(get_args(type_)[0], value))
        elif value is not None and (type_ is Path or Path in get_args(type_)):
            made[field.name] = Path(value)
        else:
            made[field.name] = value
    return kind(**made)


def nearest(name: str, kind: Any) -> str:
    """A "did you mean" hint for an unknown setting; empty if no name is similar."""
    groups = {group: type_ for group, type_ in get_type_hints(kind).items() if is_dataclass(type_)}
    known = {each: each for each in get_type_hints(kind)}
    for group, type_ in groups.items():
        known = {each: f"{each} in {group}" for each in get_type_hints(type_)} | known
    found = get_close_matches(name, known, n=1)
    return f"; did you mean {known[found[0]]}?" if found else ""


def fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON is valid for a setting of this type."""
    choices = get_args(kind)
    if is_dataclass(kind):
        return isinstance(value, dict)
    if get_origin(kind) is Literal:
        return value in choices
    if get_origin(kind) is tuple:
        return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
    if choices:  # a union
        return any(fits(value, choice) for choice in choices)
    allowed = {float: (int, float), Path: (str,)}.get(kind, (kind,))
    return isinstance(value, allowed) and not (isinstance(value, bool) and kind is not bool)


def changed_options(recorded: FinetuneSettings, settings: FinetuneSettings) -> list[str]:
    """Describe each option in `settings` that would change the result of the `recorded` run."""
    found, groups = [], [(recorded.data, settings.data), (recorded.training, settings.training)]
    if recorded.data.folds:  # all folds must be measured in the same way
        groups.append((recorded.generation, settings.generation))
    for before, now in groups:
        for field in fields(before):
            old, new = getattr(before, field.name), getattr(now, field.name)
            option = f"--{option_name(field.name)}" + f" {new}" * (new is not True)
            if old == new or field.name in FREE:
                continue
            if field.name not in EXTENDED or recorded.data.folds:
                had = "the default" if old is None else "it off" if old is False else old
                found.append(f"{option}: the run has {had}")
            elif (new or math.inf) < (old or math.inf):
                found.append(f"{option}: the run has {old or 'no limit'}, and can only be made longer")
    return found


def check_record(folder: Path, now: Record) -> None:
    """Compare the record of the run in `folder` with the current one; print the differences between the machines.

    Raises:
        UserError: the conversations or the model have changed, or the record is damaged.
    """
    recorded = read_json_object(folder / SETTINGS, ADVICE)
    before, machine = recorded.get("fingerprints"), recorded.get("machine")
    if not isinstance(before, dict) or not isinstance(machine, dict):
        raise UserError(f"{folder / SETTINGS} lacks the record of the run's data, model and machine; {ADVICE}")
    found = [
        f"the {name} {'has' if name == 'model' else 'have'} changed"
        for name, value in now.fingerprints.items()
        if value != before.get(name)
    ]
    if found:
        raise UserError(
            f"{folder} can't be resumed: since it began, {' and '.join(found)}; restore the original or start a new run"
        )
    names = [name for name, value in now.machine.items() if value != machine.get(name)]
    if "processes" in names:  # torchrun gives each process fewer threads
        names = [name for name in names if name not in ("processes", "threads")]
        processes = f"{machine.get('processes')} processes, resuming with {now.machine['processes']}"
        display(f"started with {processes}: results will be equal up to rounding")
    if names:
        changes = (f"{name} {json.dumps(machine.get(name))} → {json.dumps(now.machine[name])}" for name in names)
        display(f"resuming on another machine ({', '.join(changes)}): results will not be bit-identical")
