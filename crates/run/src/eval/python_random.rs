//! Python's `random.Random(seed).sample`, so that few-shot examples drawn by a seed are the ones
//! that lm-evaluation-harness draws.
//!
//! The generator is MT19937 (Matsumoto and Nishimura, 1998), seeded by `init_by_array`; numbers
//! below a bound are drawn by taking as many bits as the bound has until one fits.

use std::collections::HashSet;

const SIZE: usize = 624;
const SHIFT: usize = 397;

/// A stream of random numbers as CPython draws them.
pub(crate) struct PythonRandom {
    state: [u32; SIZE],
    next: usize,
}

impl PythonRandom {
    /// `random.Random(seed)`.
    pub(crate) fn new(seed: u64) -> Self {
        let key = match (seed as u32, (seed >> 32) as u32) {
            (low, 0) => vec![low],
            (low, high) => vec![low, high],
        };
        let mut state = [0; SIZE];
        state[0] = 19_650_218;
        for i in 1..SIZE {
            state[i] = next_seed(state[i - 1], 1_812_433_253).wrapping_add(i as u32);
        }
        let (mut i, mut j) = (1, 0);
        for _ in 0..SIZE.max(key.len()) {
            let mixed = state[i] ^ next_seed(state[i - 1], 1_664_525);
            state[i] = mixed.wrapping_add(key[j]).wrapping_add(j as u32);
            (i, j) = (i + 1, (j + 1) % key.len());
            if i == SIZE {
                state[0] = state[SIZE - 1];
                i = 1;
            }
        }
        for _ in 0..SIZE - 1 {
            let mixed = state[i] ^ next_seed(state[i - 1], 1_566_083_941);
            state[i] = mixed.wrapping_sub(i as u32);
            i += 1;
            if i == SIZE {
                state[0] = state[SIZE - 1];
                i = 1;
            }
        }
        state[0] = 0x8000_0000;
        Self { state, next: SIZE }
    }

    fn next_u32(&mut self) -> u32 {
        if self.next == SIZE {
            for i in 0..SIZE {
                let y = (self.state[i] & 0x8000_0000) | (self.state[(i + 1) % SIZE] & 0x7fff_ffff);
                let twist = if y & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + SHIFT) % SIZE] ^ (y >> 1) ^ twist;
            }
            self.next = 0;
        }
        let mut y = self.state[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    /// A number below `bound`, which is not 0.
    fn below(&mut self, bound: usize) -> usize {
        let bits = usize::BITS - bound.leading_zeros();
        loop {
            let drawn = (self.next_u32() >> (32 - bits)) as usize;
            if drawn < bound {
                return drawn;
            }
        }
    }

    /// `sample(range(population), count)`; `count` is not more than `population`, and `population`
    /// is below 2³².
    pub(crate) fn sample(&mut self, population: usize, count: usize) -> Vec<usize> {
        let mut small = 21;
        if count > 5 {
            small += 4_usize.pow(((count * 3) as f64).log(4.0).ceil() as u32);
        }
        if population <= small {
            let mut pool: Vec<usize> = (0..population).collect();
            return (0..count)
                .map(|i| {
                    let drawn = self.below(population - i);
                    let taken = pool[drawn];
                    pool[drawn] = pool[population - i - 1];
                    taken
                })
                .collect();
        }
        let mut seen = HashSet::new();
        (0..count)
            .map(|_| {
                loop {
                    let drawn = self.below(population);
                    if seen.insert(drawn) {
                        return drawn;
                    }
                }
            })
            .collect()
    }
}

fn next_seed(previous: u32, factor: u32) -> u32 {
    (previous ^ (previous >> 30)).wrapping_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `r = random.Random(1234)`; `[r.sample(range(n), k) for n, k in …]` of CPython 3.11.
    #[test]
    fn samples_are_those_of_python() {
        let expected = [
            (7473, 5, vec![6374, 3610, 957, 61, 742]),
            (7473, 8, vec![7462, 6610, 4769, 286, 5501, 5677, 687, 806]),
            (10, 5, vec![5, 3, 0, 7, 6]),
            (30, 8, vec![11, 20, 19, 15, 27, 14, 4, 2]),
            (5, 5, vec![1, 0, 3, 4, 2]),
        ];
        let mut random = PythonRandom::new(1234);
        for (population, count, expected) in expected {
            assert_eq!(random.sample(population, count), expected);
        }
        // `random.Random(2**40 + 7).sample(range(1000), 3)`: a seed of two words.
        assert_eq!(PythonRandom::new((1 << 40) + 7).sample(1000, 3), [628, 765, 834]);
    }
}
