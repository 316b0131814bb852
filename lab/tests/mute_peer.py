"""A runner that answers every line with what its set-up says, whether it makes sense or not."""

import json
import sys

setup = json.loads(sys.stdin.readline())
print(setup["hello"], flush=True)
for _ in sys.stdin:
    print(setup["answer"], flush=True)
