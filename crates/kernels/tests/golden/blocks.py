"""Golden values for block formats: random blocks with sane scales, widened by the `gguf` package.

    pip install gguf==0.19.0 numpy
    python blocks.py > blocks.json
"""
import json

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize

random = np.random.default_rng(7)
# type: (block bytes, offsets of its f16 scales)
LAYOUT = {
    T.Q4_0: (18, [0]), T.Q4_1: (20, [0, 2]), T.Q5_0: (22, [0]), T.Q5_1: (24, [0, 2]), T.Q8_0: (34, [0]),
    T.Q4_K: (144, [0, 2]), T.Q5_K: (176, [0, 2]), T.Q6_K: (210, [208]),
}
cases = []
for kind, (size, scales) in LAYOUT.items():
    blocks = random.integers(0, 256, (2, size), dtype=np.uint8)
    for at in scales:
        blocks[:, at:at + 2] = random.uniform(-0.05, 0.05, 2).astype(np.float16).view(np.uint8).reshape(2, 2)
    values = dequantize(blocks, kind).astype(np.float32).ravel()
    cases.append({"type": int(kind), "bytes": blocks.ravel().tolist(), "values": [float(v) for v in values]})
plain = random.normal(size=16).astype(np.float32)
for kind, data in [(T.F32, plain), (T.F16, plain.astype(np.float16))]:
    cases.append({"type": int(kind), "bytes": data.view(np.uint8).tolist(), "values": [float(v) for v in data.astype(np.float32)]})
bf16 = (plain.view(np.uint32) >> 16).astype(np.uint16)
cases.append({"type": int(T.BF16), "bytes": bf16.view(np.uint8).tolist(),
              "values": [float(v) for v in (bf16.astype(np.uint32) << 16).view(np.float32)]})
print(json.dumps(cases))
