"""Read the versions and the platform that an NPU blob states.

OpenVINO's NPUW exports a header (magic, OpenVINO's version as three 32-bit integers) and the compiled subgraphs. The
subgraphs for an NPU are ELF images; the compiler writes a compatibility string into their section of that name.
"""

import io
import mmap
import re
import struct
from itertools import pairwise
from pathlib import Path

from pipeline.common.errors import PipelineError
from pipeline.common.manifest import Compiled

MAGIC = b"\x13\x37npuwLLMCMO"
ELF = b"\x7fELF\x02\x01"
COMPATIBILITY = re.compile(r"compiler=([\d.]+);npu=(\d+);")


def read_blob(path: Path) -> Compiled:
    """Return what the blob at `path` states.

    Raises PipelineError when it is no NPUW blob, holds no NPU binary, or holds binaries that differ in compatibility.
    """
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    with path.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise PipelineError(f"{path} is not a blob that OpenVINO's NPUW exported: compile it again.")
        version = ".".join(map(str, struct.unpack("<3I", stream.read(12).ljust(12, b"\0"))))
        found = []
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            starts = [match.start() for match in re.finditer(re.escape(ELF), content)]
            for start, end in pairwise([*starts, len(content)]):
                try:
                    section = ELFFile(io.BytesIO(content[start:end])).get_section_by_name("compatibility_string")
                except (ELFError, UnicodeDecodeError) as error:
                    raise PipelineError(f"{path} holds a damaged NPU binary ({error}): compile it again.") from error
                found.append(section.data().rstrip(b"\0").decode("ascii") if section else "")
    match = COMPATIBILITY.match(found[0]) if len(set(found)) == 1 else None
    if match is None:
        raise PipelineError(
            f"{path} should hold NPU binaries of one kind, it has {sorted(set(found)) or 'none'}: it is no NPU blob."
        )
    return Compiled(openvino=version, compiler=match[1], platform=match[2], compatibility=found[0], images=len(found))
