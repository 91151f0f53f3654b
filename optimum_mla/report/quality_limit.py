"""How far a conversion may raise the perplexity before the summary, the report and the model card say so."""

from __future__ import annotations

LARGEST_RISE = 0.1
"""The largest relative rise of the perplexity that passes without a warning."""


def quality_warning(before: float | None, after: float | None, text: str | None) -> str | None:
    """Return one line about a perplexity that rose beyond `LARGEST_RISE`, or None.

    Args:
        before: The source model's perplexity, or None where it was not measured.
        after: The converted model's perplexity on the same text.
        text: What the text is, such as `evaluation`.
    """
    if before is None or after is None or after <= before * (1 + LARGEST_RISE):  # also no number is beyond it
        return None
    rise = 100 * (after / before - 1)
    return (
        f"warning: the perplexity on the {text} text rose from {before:.2f} to {after:.2f} (+{rise:.0f} %, limit "
        f"{100 * LARGEST_RISE:.0f} %). Train the model with mla-finetune before you use it, or keep more of the cache."
    )
