"""The process behind `sateen.rewards.math`: one question per line, one reply per line, both JSON.

It is started by its path and imports nothing of Sateen. math-verify's own alarm stays on as a first line; the
judge's kill is the second.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

MEMORY_BYTES = 4 * 2**30  # of address space, for powers of powers


def main() -> None:
    """Answers until its input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no reply
    from math_verify import parse, verify
    from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig

    # No unanchored fallback, no operator repair: the box is the whole answer.
    latex = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    configs = [latex, ExprExtractionConfig(try_extract_without_anchor=False)]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def read(text: str) -> list[Any]:
        found: list[Any] = parse(f"$\\boxed{{{text}}}$", configs)
        return found

    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        reply = {"readable": False, "same": False}
        try:
            gold = read(question["gold"])
            reply["readable"] = bool(gold)
            if gold and question["answer"] is not None:
                reply["same"] = bool(verify(gold, read(question["answer"])))
        except (Exception, MemoryError):
            pass  # what cannot be compared is not the same; `readable` tells a bad key
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
