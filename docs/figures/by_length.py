"""Draws the time of a training step, per token, against the length of its sequences.

    for n in 64 128 256 512 1024 2048 4096; do
        hydralora bench train --method hydralora --batches 1 --repeat 2 \\
            --batch-size $((4096 / n)) --seq-len $n --json > $n.json
    done
    python3 by_length.py 64.json 128.json … > by_length.svg
"""

import json
import sys

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 340, 60, 130, 20, 50
PARTS = [("products", "#1f6fb4"), ("attention", "#c0504d"), ("everything else", "#8a8a8a")]


def read(path):
    """Sequence length, and milliseconds per token of each of `PARTS`."""
    with open(path) as file:
        report = json.load(file)
    run = report["methods"][0]
    total = 1000 / run["tokens_per_s"]
    shares = {part["part"]: part["share"] for part in run["parts"]}
    attention = sum(share for part, share in shares.items() if "attention" in part)
    products = sum(share for part, share in shares.items() if "linear" in part or "entropy" in part)
    length = int(path.rsplit("/")[-1].split(".")[0])
    return length, [total * products, total * attention, total * (1 - products - attention)]


def main(paths):
    rows = sorted(read(path) for path in paths)
    top = max(sum(parts) for _, parts in rows) * 1.1
    across = (WIDTH - LEFT - RIGHT) / len(rows)
    height = HEIGHT - TOP - BOTTOM
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for tick in range(0, int(top) + 1):
        y = HEIGHT - BOTTOM - height * tick / top
        out.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
    for index, (length, parts) in enumerate(rows):
        x, y = LEFT + across * (index + 0.15), HEIGHT - BOTTOM
        for value, (_, colour) in zip(parts, PARTS):
            tall = height * value / top
            y -= tall
            out.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{across * 0.7:.1f}" height="{tall:.1f}" '
                f'fill="{colour}"/>'
            )
        middle = x + across * 0.35
        out.append(f'<text x="{middle:.1f}" y="{y - 5:.1f}" text-anchor="middle">{sum(parts):.2f}</text>')
        out.append(f'<text x="{middle:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{length}</text>')
    for index, (name, colour) in enumerate(reversed(PARTS)):
        y = TOP + 20 * index
        out.append(f'<rect x="{WIDTH - RIGHT + 10}" y="{y}" width="12" height="12" fill="{colour}"/>')
        out.append(f'<text x="{WIDTH - RIGHT + 28}" y="{y + 10}">{name}</text>')
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    out.append(f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">tokens of a sequence</text>')
    out.append(
        f'<text x="16" y="{TOP + height / 2}" text-anchor="middle" '
        f'transform="rotate(-90 16 {TOP + height / 2})">ms per token</text>'
    )
    print("\n".join([*out, "</svg>"]))


main(sys.argv[1:])
