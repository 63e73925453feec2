"""Read Parquet and Arrow tables, the formats of published and saved datasets, as JSON Lines."""

import importlib
import json
from collections.abc import Iterable, Iterator
from typing import IO, Any

from dialogues.layouts.records import FormatError
from support.errors import check_extra

REQUIREMENT = "pyarrow>=21,<27"  # as in requirements-extra.txt
PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
MARKS = (PARQUET, ARROW_FILE, ARROW_STREAM)
ROWS = 1000  # number of rows to convert to Python objects at a time


def json_lines(file: IO[bytes], head: bytes, name: str) -> Iterator[bytes]:
    """Yield the rows of a Parquet or Arrow file as lines of JSON, converted one batch at a time.

    Args:
        head: the first bytes of the file, which begin with one of `MARKS`.

    Raises:
        UserError: pyarrow is not installed.
        FormatError: the file is damaged.
    """
    check_extra("pyarrow", f"--data {name}", REQUIREMENT)
    pyarrow = importlib.import_module("pyarrow")
    try:
        for batch in batches(file, head):
            for row in batch.to_pylist():
                yield json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"
    except pyarrow.ArrowInvalid as error:
        raise FormatError(f"the table is damaged or cut short ({error}); copy or download it again") from None


def batches(file: IO[bytes], head: bytes) -> Iterable[Any]:
    """Return the rows of a table as record batches of at most `ROWS` rows."""
    if head.startswith(PARQUET):
        return importlib.import_module("pyarrow.parquet").ParquetFile(file).iter_batches(batch_size=ROWS)
    ipc = importlib.import_module("pyarrow.ipc")
    if head.startswith(ARROW_STREAM):
        whole = iter(ipc.open_stream(file))
    else:
        table = ipc.open_file(file)
        whole = (table.get_batch(number) for number in range(table.num_record_batches))
    return (batch.slice(start, ROWS) for batch in whole for start in range(0, len(batch), ROWS))
