"""Golden values for block formats: random blocks with sane scales, widened by the `gguf` package.
Bytes, and the values as bytes of `f32`, are in hexadecimal.

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
    T.Q4_K: (144, [0, 2]), T.Q5_K: (176, [0, 2]), T.Q6_K: (210, [208]), T.Q2_K: (84, [80, 82]), T.Q3_K: (110, [108]),
    T.IQ4_NL: (18, [0]), T.IQ4_XS: (136, [0]), T.MXFP4: (17, []),
}
cases = []


def case(kind, blocks, values):
    values = values.astype(np.float32).ravel()
    cases.append({"type": int(kind), "bytes": blocks.tobytes().hex(), "values": values.tobytes().hex()})


for kind, (size, scales) in LAYOUT.items():
    blocks = random.integers(0, 256, (4 if kind == T.MXFP4 else 2, size), dtype=np.uint8)
    for at in scales:
        blocks[:, at:at + 2] = random.uniform(-0.05, 0.05, 2).astype(np.float16).view(np.uint8).reshape(2, 2)
    if kind == T.MXFP4:
        blocks[:, 0] = [0, 1, 2, 121]   # the least powers are subnormal
    case(kind, blocks, dequantize(blocks, kind))
plain = random.normal(size=16).astype(np.float32)
for kind, data in [(T.F32, plain), (T.F16, plain.astype(np.float16))]:
    case(kind, data, data)
bf16 = (plain.view(np.uint32) >> 16).astype(np.uint16)
case(T.BF16, bf16, (bf16.astype(np.uint32) << 16).view(np.float32))
print("[\n" + ",\n".join(json.dumps(case) for case in cases) + "\n]")
