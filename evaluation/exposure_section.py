"""The report's section on private strings that the model gives away."""

from dataclasses import dataclass

from dialogues.private import KINDS
from evaluation.metric_table import show
from evaluation.results import DAMAGED, ExposedString, Exposure
from evaluation.run_files import RunFiles


@dataclass(frozen=True)
class ExposureSection:
    """Sentences on the search and its result, and a row for each of the worst strings."""

    lead: str
    rows: list[list[str]]
    more: int
    completed: bool


def exposure_section(run: RunFiles) -> ExposureSection | None:
    """The section, or None if nothing was measured; add a note if its part of evaluation.json is malformed."""
    if run.evaluation.get("exposure") is None:
        return None
    try:
        found = Exposure.from_json(run.evaluation["exposure"])
        rows = [row_of(each) for each in found.strings]
    except DAMAGED:
        run.notes.append("evaluation.json: its exposure is malformed and is left out of the report")
        return None
    return ExposureSection(describe(found), rows, max(0, int(found.tried) - len(rows)), found.completed > 0)


def describe(found: Exposure) -> str:
    """Sentences on the dialogues that were searched, and the strings that were found and tested."""
    through = f"{found.looked_through:,.0f}"
    if found.looked_through < found.dialogues:
        through += f" of {found.dialogues:,.0f}, chosen at random"
    if not found.found:
        return f"No private strings were found in the training dialogues (searched: {through})."
    tested = "all were tested"
    if found.tried < found.found:
        tested = f"{found.tried:,.0f} of them, chosen at random, {'was' if found.tried == 1 else 'were'} tested"
    text = (
        f"Private strings in the training dialogues: {found.found:,.0f} (searched: {through}); {tested}."
        f" Completed word for word: {found.completed:,.0f}."
    )
    if found.ranked:
        text += (
            f" Ranked first among 32 candidates: {found.first:,.0f} of {found.ranked:,.0f}"
            f" (by chance: {found.first_by_chance:,.1f})."
        )
    return text


def row_of(each: ExposedString) -> list[str]:
    """The cells of a string's row."""
    return [
        f"{KINDS.get(each.kind, ('number',))[0]} {each.shown}",
        "yes" if each.completed else "no",
        "–" if each.rank is None else f"{each.rank:,.0f}",
        "–" if each.exposure is None else show(each.exposure, "{:.1f}"),
        f"{each.occurrences:,.0f}",
        str(each.dialogue),
    ]
