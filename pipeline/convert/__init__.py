"""Convert and quantize a checkpoint."""

import sys

# OpenVINO's converter and NNCF report each use to Google Analytics without asking, by a process of its own for each
# message. Where this package is missing, they report nothing.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
