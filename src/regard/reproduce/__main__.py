"""``python -m regard.reproduce KEY [KEY ...]``: the same as ``regard reproduce``, without the command-line extras."""

from __future__ import annotations

import json
import sys

from regard.reproduce import reproduce

for key in sys.argv[1:]:
    print(json.dumps(reproduce(key), indent=2))
