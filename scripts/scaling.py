#!/usr/bin/env python3
"""How efficient training on many nodes is: a model of a step, and a simulation of its messages to check it.

    scripts/scaling.py --compute-s 1.9 --jitter 0.02 --bytes 9437184

What is measured goes in: the seconds that a rank computes in a step, how much these vary (standard deviation over
mean), and the bytes of the gradients. The network is stated: a time for each message and a bandwidth.

The model: a step lasts as long as the slowest rank computes, and then as long as messages take. The slowest of
N is the expected largest of N draws from a normal distribution, some of which are stragglers. Messages are
those of crates/train/src/ranks: four agreements (recursive doubling, log2 N messages one after the other) and a
sum (N - 1 messages of a slice each for the exchange, as many for the sums on their way back).

The simulation moves a clock for every rank and gives every message its own random delay, so that a late rank
holds up its neighbours, and they theirs.
"""

import argparse
import math
import random

AGREEMENTS = 4
# What a rank says where all agree: bytes.
WORDS = 512


class Setting:
    def __init__(self, arguments, nodes, gbit):
        self.nodes = nodes
        self.compute = arguments.compute_s
        self.jitter = arguments.jitter
        self.bytes = arguments.bytes
        self.share = arguments.straggler_share
        self.factor = arguments.straggler_factor
        self.latency = arguments.latency_us * 1e-6
        self.spread = arguments.latency_spread
        self.rate = gbit * 1e9 / 8

    def message(self, size):
        return self.latency + size / self.rate


def normal_below(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def slowest(of):
    """The expected largest of the ranks' times: the integral of 1 - F^N."""
    sigma = max(of.jitter * of.compute, 1e-12)
    top = of.compute * max(of.factor, 1) * (1 + 8 * of.jitter) + 8 * sigma
    steps = 20000
    width = top / steps
    total = 0.0
    for at in range(steps):
        t = (at + 0.5) * width
        usual = normal_below((t - of.compute) / sigma)
        late = normal_below((t - of.factor * of.compute) / (of.factor * sigma))
        total += (1 - ((1 - of.share) * usual + of.share * late) ** of.nodes) * width
    return total


def rounds(nodes):
    return math.ceil(math.log2(nodes)) if nodes > 1 else 0


def messages(of):
    """Seconds of a step's messages where none is late."""
    if of.nodes == 1:
        return 0.0
    agree = sum(of.message(min(2**k, of.nodes - 2**k) * WORDS) for k in range(rounds(of.nodes)))
    slice_of = of.bytes / of.nodes
    return AGREEMENTS * agree + 2 * (of.nodes - 1) * of.message(slice_of)


def model(of):
    return of.compute / (slowest(of) + messages(of))


def simulate(of, steps, chance):
    nodes = of.nodes
    clocks = [0.0] * nodes

    def delay(size):
        # Some of a message's time is always there, the rest has a long tail with the same mean.
        fixed = (1 - of.spread) * of.latency
        return fixed + chance.expovariate(1.0) * of.spread * of.latency + size / of.rate

    def hop(distance, size):
        # Rank i goes on when it has what rank i - distance sent.
        return [max(clocks[i], clocks[i - distance]) + delay(size) for i in range(nodes)]

    for _ in range(steps):
        for i in range(nodes):
            factor = of.factor if chance.random() < of.share else 1.0
            clocks[i] += max(0.0, factor * chance.gauss(of.compute, of.jitter * of.compute))
        for _ in range(AGREEMENTS):
            for k in range(rounds(nodes)):
                clocks = hop(2**k, min(2**k, nodes - 2**k) * WORDS)
        for distance in range(1, nodes):
            clocks = hop(distance, of.bytes / nodes)
        for _ in range(1, nodes):
            clocks = hop(1, of.bytes / nodes)
    return steps * of.compute / max(clocks)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compute-s", type=float, required=True)
    parser.add_argument("--jitter", type=float, default=0.02)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--straggler-share", type=float, default=0.001, help="steps of a rank that are late")
    parser.add_argument("--straggler-factor", type=float, default=1.5, help="how late")
    parser.add_argument("--latency-us", type=float, default=30.0, help="of a message, TCP's over Ethernet")
    parser.add_argument("--latency-spread", type=float, default=0.5, help="share of it that is random")
    parser.add_argument("--gbit", type=float, nargs="+", default=[10, 100])
    parser.add_argument("--nodes", type=int, nargs="+", default=[8, 64, 1000])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    print(f"{'nodes':>6} {'Gbit/s':>7} {'slowest s':>10} {'messages s':>11} {'model':>7} {'simulated':>10}")
    worst = 0.0
    for nodes in arguments.nodes:
        for gbit in arguments.gbit:
            of = Setting(arguments, nodes, gbit)
            simulated = simulate(of, arguments.steps, random.Random(arguments.seed))
            worst = max(worst, abs(model(of) - simulated))
            print(
                f"{nodes:6} {gbit:7g} {slowest(of):10.3f} {messages(of):11.4f} {model(of):7.3f} {simulated:10.3f}"
            )
    print(f"model and simulation are at most {100 * worst:.1f} points apart")


if __name__ == "__main__":
    main()
