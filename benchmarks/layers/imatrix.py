"""Reader of llama.cpp's legacy importance matrix: mean squares of what each linear reads.

    int32 n; then n entries of: int32 length, name, int32 ncall, int32 nval, nval float32

The values are sums over `ncall` chunks of mean squares per input channel, so that
rms[k] = sqrt(value[k] / ncall). Little-endian. What follows the entries (the name of the
calibration text) is not read.
"""

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read_imatrix(path: str | Path) -> dict[str, Tensor]:
    """RMS (fp32 [K]) of every linear's input channels, by tensor name; 0 for a dead channel.

    Raises:
        ValueError: not such a file, or one cut short, naming it.
    """
    data = Path(path).read_bytes()
    try:
        return _entries(data)
    except (struct.error, ValueError) as error:
        raise ValueError(f"{path}: expected a legacy importance matrix, found {error}") from error


def _entries(data: bytes) -> dict[str, Tensor]:
    (count,), offset = struct.unpack_from("<i", data), 4
    rms = {}
    for _ in range(count):
        (length,) = struct.unpack_from("<i", data, offset)
        (name,) = struct.unpack_from(f"<{length}s", data, offset + 4)
        calls, values = struct.unpack_from("<ii", data, offset + 4 + length)
        offset += 12 + length
        if calls < 1 or values < 1:
            raise ValueError(f"{calls} calls and {values} values in entry {len(rms)}")
        sums = torch.from_numpy(np.frombuffer(data, "<f4", values, offset).copy())
        rms[name.decode("utf-8")] = (sums / calls).sqrt()
        offset += 4 * values
    return rms
