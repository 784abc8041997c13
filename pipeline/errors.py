"""The one exception that a user's mistake or a refused artifact raises."""


class PipelineError(Exception):
    """Its message is the sentence that the user reads: what failed, why, and what to do."""
