"""`python -m pipeline.check.directml` installs what is needed to run DirectML in software."""

import sys

from pipeline.check.directml.wine import install
from pipeline.common.errors import PipelineError

if __name__ == "__main__":
    try:
        install()
    except PipelineError as error:
        sys.exit(f"error: {error}")
