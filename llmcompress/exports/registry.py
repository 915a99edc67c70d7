"""The targets of `llmcompress export`, by name. A new one is a file of this room and a line here."""

from __future__ import annotations

from llmcompress.errors import CompressError, argument
from llmcompress.exports import compressed_tensors, gguf_target
from llmcompress.exports.target import Target

TARGETS: dict[str, Target] = {
    target.name: target for target in (compressed_tensors.TARGET, gguf_target.TARGET)
}


def target_of(name: str) -> Target:
    """The target of a name. Errors: CompressError, which lists the names that there are."""
    if name not in TARGETS:
        known = ", ".join(TARGETS) or "none"
        raise CompressError(f"{argument('to')} {name[:80]} is no target; give one of: {known}")
    return TARGETS[name]
