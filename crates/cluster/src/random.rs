//! Random numbers that follow from a seed and a purpose alone.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A stream of random numbers.
pub struct Random(ChaCha8Rng);

impl Random {
    /// Begins the stream of `purpose` under `seed`.
    pub fn new(seed: u64, purpose: u64) -> Self {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        generator.set_stream(purpose);
        Self(generator)
    }

    /// Draws from [0, 1) uniformly.
    pub fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Draws from `0..count` uniformly, for a positive `count`.
    pub fn below(&mut self, count: usize) -> usize {
        ((self.unit() * count as f64) as usize).min(count.saturating_sub(1))
    }

    /// Draws from the standard normal distribution (Box and Muller's transform).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// Draws `count` of `0..total`, in increasing order (Knuth's algorithm S); all of them if fewer.
    pub fn sample(&mut self, total: usize, count: usize) -> Vec<usize> {
        if count >= total {
            return (0..total).collect();
        }
        let mut chosen = Vec::with_capacity(count);
        for index in 0..total {
            let wanted = count - chosen.len();
            if self.unit() * ((total - index) as f64) < wanted as f64 {
                chosen.push(index);
            }
        }
        chosen
    }

    /// Puts `items` into random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_of_the_size_asked_for_and_in_order() {
        let mut random = Random::new(3, 0);
        for (total, count) in [(10, 0), (10, 3), (10, 10), (10, 20), (0, 4)] {
            let sample = random.sample(total, count);
            assert_eq!(sample.len(), count.min(total));
            assert!(sample.windows(2).all(|pair| pair[0] < pair[1]));
            assert!(sample.iter().all(|&index| index < total));
        }
    }
}
