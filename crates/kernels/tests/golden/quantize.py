"""Golden bytes of narrowed numbers, by the `gguf` package.

    pip install gguf==0.19.0 numpy
    python quantize.py > quantize.json
"""
import json

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf.quants import quantize

random = np.random.default_rng(11)
values = random.normal(0, 0.05, 4 * 32).astype(np.float32)
values[32:64] = 0.0             # a block without scale
values[64:96] = values[64] + random.integers(0, 16, 32).astype(np.float32) / 64   # offset, few levels
cases = []
for kind in (T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_0, T.Q4_1):
    data = values if kind == T.F32 else values.astype(np.float16) if kind == T.F16 else quantize(values, kind)
    cases.append({"type": int(kind), "bytes": data.view(np.uint8).ravel().tolist()})
print(json.dumps({"values": [float(v) for v in values], "cases": cases}))
