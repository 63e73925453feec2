import json
import sys
from collections import Counter
from pathlib import Path

from dialogues.inputs import find_inputs
from dialogues.reading import open_source
from support.errors import UserError

try:
    out = []
    for input in find_inputs([Path(a) for a in sys.argv[1:]]).inputs:
        source = open_source(input)
        n = Counter()
        sk = Counter()
        for number, record in source.records:
            for d in source.convert(record):
                sk.update(d.skipped)
                if d.turns:
                    out.append(json.dumps({"turns": [t._asdict() for t in d.turns]}, ensure_ascii=False))
                n.update(t.speaker for t in d.turns)
        print(
            source.format, dict(n.most_common(6)), dict(sk), source.not_used, *source.account, sep="\n", file=sys.stderr
        )
    print(*out, sep="\n")
except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(2)
