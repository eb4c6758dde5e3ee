"""How does a CUDA source become functions that Python calls?   nvcc, a cached library, ctypes

torch's own builder of extensions asks for a CUDA build of torch, headers of it and minutes. A
library with a C interface and a runtime of its own takes seconds, knows nothing of torch, and loads
on a machine without a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

FLAGS = ("-O3", "-std=c++17", "-ftz=true", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static")


DEFAULT_HOME = "/usr/local/cuda"


def find_nvcc() -> str | None:
    """The compiler on the PATH, under CUDA_HOME, or where CUDA is installed by default."""
    homes = os.environ.get("CUDA_HOME"), DEFAULT_HOME
    folders = [os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("nvcc", path=os.pathsep.join(folders))


@functools.cache
def load(source: Path, arch: str) -> ctypes.CDLL | None:
    """The library of `source` for `arch` ("90a": code for sm_90a alone), built at its first use.

    None without nvcc, and, after a warning with its own words, if it refuses: it may lack a
    compiler for the host, or not know `arch`.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        return None
    try:
        return ctypes.CDLL(str(build(source, arch, nvcc, cache_folder())))
    except (RuntimeError, OSError) as refusal:
        warnings.warn(f"{source.name} is done without: {refusal}", stacklevel=2)
        return None


def cache_folder() -> Path:
    """Where built libraries stay: XDG_CACHE_HOME/megatron_srpo."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "megatron_srpo"


def build(source: Path, arch: str, nvcc: str, folder: Path) -> Path:
    """The library in `folder`, named after all that it depends on; processes may race for it.
    Raises `RuntimeError` with nvcc's own words if it refuses."""
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    told = source.read_text(), arch, version.stdout, *FLAGS
    digest = hashlib.sha256("\0".join(told).encode()).hexdigest()[:16]
    library = folder / f"{source.stem}.sm_{arch}.{digest}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            unfinished = Path(scratch) / library.name
            target = f"arch=compute_{arch},code=sm_{arch}"
            command = [nvcc, *FLAGS, "-gencode", target, "-o", str(unfinished), str(source)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"nvcc cannot build {source.name}:\n{done.stderr}")
            os.replace(unfinished, library)
    return library
