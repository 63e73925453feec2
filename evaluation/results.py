"""The results of an evaluation, and their format in evaluation.json."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

from evaluation.metrics import CONFIDENCE, RESAMPLES, Estimate
from evaluation.run_files import EVALUATION_VERSION, number
from settings import GenerationSettings
from support.files import Json, without_none

DAMAGED = (AttributeError, KeyError, TypeError, ValueError)  # raised by `from_json` for a different structure


class TooFew(NamedTuple):
    """A metric that could not be measured, and the data it `needed`."""

    needed: str


class CopiedSpan(NamedTuple):
    """A run of words that also occurs in a training dialogue, and the number of that dialogue."""

    words: int
    text: str
    dialogue: int


Number = Estimate | TooFew | None  # None: not measured here
Group = dict[str, Estimate] | None


@dataclass(frozen=True)
class Metrics:
    """The metrics of one model, or of the true replies, in the order of evaluation.json.

    Attributes:
        longest_copied_span: None if nothing was copied, or if copies were not searched for.
    """

    loss: Estimate | None = None
    perplexity: Estimate | None = None
    bits_per_byte: Estimate | None = None
    loss_by_speaker: Group = None
    loss_by_turn: Group = None
    loss_by_part: "dict[str, Metrics] | None" = None
    context_use: Number = None
    context_use_by_turns: Group = None
    context_use_beyond_other: Number = None
    context_use_of_other_history: Number = None
    hits_at_1: Number = None
    chance_hits_at_1: Number = None
    voice: Number = None
    chance_voice: Number = None
    voice_true: Group = None
    voice_generated: Group = None
    distinct_1: Number = None
    distinct_2: Number = None
    repetition: Number = None
    words_per_reply: Number = None
    empty_replies: Estimate | None = None
    copied_5grams: Number = None
    longest_copied_span: CopiedSpan | None = None
    chrf: Estimate | None = None
    bleu: Estimate | None = None
    loss_change: Estimate | None = None

    def joined(self, other: "Metrics") -> "Metrics":
        """The metrics of both objects; those of `other` take precedence."""
        return replace(self, **{name: found for name, found in vars(other).items() if found is not None})

    def numbers(self) -> dict[str, Estimate]:
        """The measured metrics that consist of one number."""
        return {name: found for name, found in vars(self).items() if isinstance(found, Estimate)}

    def too_small(self) -> dict[str, str]:
        """The metrics that could not be measured, and the data they need."""
        return {name: found.needed for name, found in vars(self).items() if isinstance(found, TooFew)}

    def to_json(self) -> Json:
        """The values by name, then the intervals, then the reasons for missing values. NaN and infinity become None."""
        values: Json = {}
        intervals: Json = {}
        for name, found in vars(self).items():
            if isinstance(found, Estimate):
                values[name] = number(found.value)
                if found.interval:
                    intervals[name] = list(map(number, found.interval))
            elif isinstance(found, TooFew):
                values[name] = None
            elif name == "longest_copied_span":
                if self.copied_5grams is not None:
                    values[name] = found and found._asdict()
            elif name == "loss_by_part" and found is not None:
                values[name] = {part: metrics.to_json() for part, metrics in found.items()}
            elif found is not None:
                values[name] = {key: number(each.value) for key, each in found.items()}
                intervals[name] = {
                    key: list(map(number, each.interval)) for key, each in found.items() if each.interval
                }
        return {**values, "intervals": intervals, "too_small": self.too_small()}

    @classmethod
    def from_json(cls, values: Json) -> "Metrics":
        """Read the output of `to_json`; unknown metrics are ignored.

        Raises:
            one of `DAMAGED`: `values` has a different structure.
        """
        intervals, too_small, found = values["intervals"], values["too_small"], {}
        for name in {field.name for field in fields(cls)} & values.keys():
            value, interval = values[name], intervals.get(name)
            if name == "loss_by_part":
                found[name] = {part: cls.from_json(each) for part, each in value.items()}
            elif name == "longest_copied_span":
                found[name] = value and CopiedSpan(**value)
            elif isinstance(value, dict):
                found[name] = {key: Estimate(each, (interval or {}).get(key)) for key, each in value.items()}
            elif name in too_small:
                found[name] = TooFew(too_small[name])
            elif value is not None:
                found[name] = Estimate(value, interval)
        return cls(**found)


def value_of(found: Number) -> float | None:
    return found.value if isinstance(found, Estimate) else None


@dataclass(frozen=True)
class ShownTurn:
    """A turn of a shown case.

    Attributes:
        copied: character spans that also occur in the training dialogues; None if they were not searched for.
    """

    speaker: str
    text: str
    copied: list[tuple[int, int]] | None = None


@dataclass(frozen=True)
class ShownCase:
    """A dialogue shown turn by turn: its beginning, the true continuation, and the continuation of each model."""

    place: int
    input: list[ShownTurn]
    response: list[ShownTurn]
    model_response: list[ShownTurn]
    base_response: list[ShownTurn] | None = None


@dataclass(frozen=True)
class Overfitting:
    """The best evaluation of a run, and the gap between training and validation loss of the saved weights."""

    best_step: int
    best_epoch: float | None
    best_val_loss: float
    last_val_loss: float
    train_set_loss: float | None
    gap: float | None


@dataclass(frozen=True)
class Origin:
    """The models that were measured, the data file, and the machine."""

    model: str
    base_model: str | None
    file: str
    device: str
    precision: str


@dataclass(frozen=True)
class Size:
    """The amount of data behind the metrics.

    Attributes:
        part: the held-out part.
        dialogues: number of dialogues, per part, whose loss was measured.
        replies: number of true replies that were scored.
        answers: number of dialogues in which the model wrote a reply.
    """

    part: str
    dialogues: dict[str, int]
    replies: int
    answers: int

    @property
    def held_out(self) -> int:
        """The number of held-out dialogues."""
        return self.dialogues[self.part]


@dataclass(frozen=True)
class Options:
    """The options that the metrics depend on, and sacrebleu's `signatures`."""

    seed: int
    template: str
    learn: str
    max_length: int
    reply_tokens: int
    generation: GenerationSettings
    signatures: dict[str, str]


@dataclass(frozen=True)
class ExposedString:
    """A private string of the training part, and how well the model knows it.

    Attributes:
        shown: its first two characters; dots replace the others.
        completed: whether the model writes it word for word after its own history.
        rank: its rank among alternatives of the same form, 1 for the likeliest; None if it was not ranked.
        among: the number of alternatives plus one.
        exposure: log2(among) - log2(rank), in bits.
        occurrences: how many times it occurs in the training dialogues that were searched.
        dialogue: the record or line number of the dialogue whose history was used, after the file if there are several.
    """

    kind: str
    shown: str
    completed: bool
    rank: int | None
    among: int | None
    exposure: float | None
    occurrences: int
    dialogue: int | str


@dataclass(frozen=True)
class Exposure:
    """The private strings of the training part that a model gives away.

    Attributes:
        looked_through: number of training dialogues that were searched.
        dialogues: number of training dialogues.
        found: number of distinct strings.
        tried: number of strings that were tested.
        completed: number of strings that the model writes word for word.
        ranked: number of tested strings that have enough alternatives to be ranked.
        first: number of strings that rank first.
        first_by_chance: expected number of these for a model that knows none of the strings.
        strings: the worst of them.
    """

    looked_through: int
    dialogues: int
    found: int
    tried: int
    completed: int
    ranked: int
    first: int
    first_by_chance: float
    strings: list[ExposedString]

    @classmethod
    def from_json(cls, values: Json) -> "Exposure":
        """Read the exposure in evaluation.json.

        Raises:
            one of `DAMAGED`: `values` has a different structure.
        """
        known = {field.name: values[field.name] for field in fields(cls)}
        strings = [ExposedString(**each) for each in known.pop("strings")]
        numbers = [*known.values(), *(each.occurrences for each in strings)]
        numbers += [value for each in strings for value in (each.rank, each.among, each.exposure) if value is not None]
        texts = all(isinstance(text, str) for each in strings for text in (each.kind, each.shown))
        places = all(isinstance(each.dialogue, int | str) for each in strings)
        if not (texts and places) or any(number(value) is None for value in numbers):
            raise ValueError("not a text, a place or a finite number")
        return cls(**known, strings=strings)


@dataclass(frozen=True)
class Evaluation:
    """The content of evaluation.json."""

    origin: Origin
    size: Size
    options: Options
    metrics: dict[str, Metrics]
    cases: list[ShownCase]
    overfitting: Overfitting | None
    exposure: Exposure | None = None
    findings: Sequence[str] = ()

    def to_json(self) -> Json:
        origin, options = self.origin, asdict(self.options)
        generation, signatures = options.pop("generation"), options.pop("signatures")
        return {
            "version": EVALUATION_VERSION,
            "model": origin.model,
            "base_model": origin.base_model,
            "data": {"file": origin.file, **asdict(self.size)},
            "settings": {
                **options,
                "resamples": RESAMPLES,
                "confidence": CONFIDENCE,
                **generation,
                "device": origin.device,
                "precision": origin.precision,
                **signatures,
            },
            "metrics": {name: metrics.to_json() for name, metrics in self.metrics.items()},
            "cases": [asdict(case, dict_factory=without_none) for case in self.cases],
            "overfitting": self.overfitting and asdict(self.overfitting),
            "exposure": self.exposure and asdict(self.exposure),
            "findings": self.findings,
        }
