"""The one exception that a user's mistake or a refused artifact raises, and the sentence for a full disk."""

import errno
import os


class PipelineError(Exception):
    """Its message is the sentence that the user reads: what failed, why, and what to do."""


def full_disk(error: Exception) -> str | None:
    """Return the sentence for the user when `error`, of this program or a library, says that the disk is full."""
    known = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not known and os.strerror(errno.ENOSPC) not in str(error):
        return None
    return f"the disk is full ({getattr(error, 'filename', None) or 'while writing'}): free some space and run again."
