"""The generated parts of `tests/README.md`: rules, faults and flags, each from the table that the tests use."""

from __future__ import annotations

import generate
from faults import FAULTS
from flags import FLAGS
from rules import RULES

README = generate.ROOT / "tests" / "README.md"


def blocks() -> dict[str, str]:
    """Name of each generated part → its Markdown."""
    return {
        "rules": generate._table(
            ("rule", "", "tests that fail without it"),
            (
                (str(number), rule.text, "<br>".join(f"`{_shown(test)}`" for test in rule.tests))
                for number, rule in enumerate(RULES, 1)
            ),
        ),
        "faults": generate._table(
            ("fault", "injected by", "tier", "test"),
            ((fault.name, fault.injection, fault.tier, f"`{_shown(fault.test)}`") for fault in FAULTS),
        ),
        "flags": generate._table(
            ("request", "error told", "by", "what the client raises", "then"),
            (
                (
                    flag.api.name,
                    flag.error,
                    "after the broker" if flag.applied else "instead of the broker",
                    flag.seen,
                    flag.then + (", **and it is committed**" if flag.committed else ""),
                )
                for flag in FLAGS
            ),
        ),
    }


def rewritten(text: str) -> str:
    """The document with every generated part as the tables say."""
    new = blocks()
    return generate._BLOCK.sub(lambda found: f"{found[1]}\n{new[found[2]]}\n\n{found[3]}", text)


def _shown(test: str) -> str:
    """File and name; the folder of the fault's tier and the parameters are told elsewhere."""
    path, _, name = test.partition("::")
    return f"{path}::{name.partition('[')[0]}"


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text(encoding="utf-8")), encoding="utf-8")
