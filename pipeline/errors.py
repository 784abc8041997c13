"""The one exception that a user's mistake or a refused artifact raises, and the sentence for a full disk."""

import errno


class PipelineError(Exception):
    """Its message is the sentence that the user reads: what failed, why, and what to do."""


def full_disk(error: OSError) -> str | None:
    """Return the sentence for the user when `error` says that the disk is full, otherwise None."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    return f"the disk is full ({error.filename or 'while writing'}): free some space and run again."
