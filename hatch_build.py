"""Compiles ``gradflow/recording/kernels.c`` while the package is built; without a compiler the package does without.

``python hatch_build.py`` compiles it in place, as ``pip install --editable .`` does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path
from typing import Any

FOLDER = Path("gradflow/recording")
LIBRARY = FOLDER / ("_kernels.dll" if sys.platform == "win32" else "_kernels.so")
FLAGS = ("-O3", "-std=c11", "-fPIC", "-fvisibility=hidden", "-shared")


def compile_kernels(root: Path) -> str:
    """Make the library below ``root``; returns why there is none, or ""."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    library = root / LIBRARY
    library.unlink(missing_ok=True)
    if compiler is None:
        return "no C compiler found"
    # Made under another name first: a build that is interrupted leaves nothing that looks whole.
    fresh = library.with_suffix(f".{os.getpid()}.tmp")
    source = root / FOLDER / "kernels.c"
    mark = f"-DGRADFLOW_SOURCE={zlib.crc32(source.read_bytes())}u"
    command = [*compiler.split(), *FLAGS, mark, str(source), "-o", str(fresh), "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{compiler} does not run: {error}"
    if done.returncode:
        fresh.unlink(missing_ok=True)
        return f"{compiler} failed: {(done.stderr.strip().splitlines() or ['no message'])[0]}"
    fresh.replace(library)
    return ""


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # compiled by hand, in an environment that builds nothing
    pass
else:

    class KernelsHook(BuildHookInterface):  # type: ignore[type-arg]
        """Puts the library beside its source, and into a wheel that is then for one platform."""

        PLUGIN_NAME = "custom"

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Compile before files are gathered."""
            trouble = compile_kernels(Path(self.root))
            if trouble:
                self.app.display_warning(f"Built without compiled kernels, recording is slower: {trouble}")
                return
            build_data["artifacts"].append(LIBRARY.as_posix())
            build_data["pure_python"] = False
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"


if __name__ == "__main__":
    sys.exit(compile_kernels(Path(__file__).parent) or 0)
