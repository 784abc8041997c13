"""`python -m pipeline.directml` installs what is needed to run DirectML in software."""

import sys

from pipeline.directml.wine import install
from pipeline.errors import PipelineError

if __name__ == "__main__":
    try:
        install()
    except PipelineError as error:
        sys.exit(f"error: {error}")
