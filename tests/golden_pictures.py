"""The pictures that the golden data were computed from."""

import numpy as np
from PIL import Image


def synthetic(height, width, seed):
    """The picture of a size and seed: integer arithmetic on wrapping 64-bit numbers."""
    y, x = np.arange(height, dtype=np.uint64)[:, None], np.arange(width, dtype=np.uint64)[None, :]
    seed = np.uint64(seed)
    t = (((np.uint64(7) * x + np.uint64(11) * y) // np.uint64(4)) + np.uint64(13) * seed) % np.uint64(512)
    ramp_x = np.broadcast_to(np.uint64(255) * x // np.uint64(max(1, width - 1)), (height, width))
    ramp_y = np.broadcast_to(np.uint64(255) * y // np.uint64(max(1, height - 1)), (height, width))
    base = [ramp_x, ramp_y, np.where(t < 256, t, np.uint64(511) - t)]
    channels = []
    for channel in range(3):
        salt = np.uint64((channel + 1) * 83492791 + int(seed) * 2654435761)
        n = (x * np.uint64(73856093)) ^ (y * np.uint64(19349663)) ^ salt
        n = ((n & np.uint64(0xFFFFFFFF)) * np.uint64(2246822519)) & np.uint64(0xFFFFFFFF)
        n = n ^ (n >> np.uint64(13))
        noise = (n >> np.uint64(8)) % np.uint64(49)
        channels.append(np.clip(base[channel].astype(np.int64) + noise.astype(np.int64) - 24, 0, 255))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))
