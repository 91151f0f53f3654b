"""The forms of reports, the sentences and pages that show them, and the model cards."""
