//! A minimum without gradients: the (1+1)-CMA-ES, which tries one point at a time and keeps it if it
//! is no worse, fit for a few dozen evaluations.
//!
//! Igel, Suttorp and Hansen, "A Computational Efficient Covariance Matrix Update and a (1+1)-CMA for
//! Evolution Strategies" (2006), with the constants given there. The step size follows the success
//! rate; the covariance's factor `C = M Mᵀ` is updated in place.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What was found.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Minimum {
    pub(super) point: Vec<f64>,
    pub(super) value: f64,
}

/// Searches from `start` inside `[-bound, bound]` per coordinate, with `budget` evaluations of `f`, the
/// one at the start included.
///
/// # Errors
/// Whatever `f` says.
pub(super) fn minimise<E>(
    start: &[f64],
    bound: f64,
    budget: usize,
    seed: u64,
    f: &mut dyn FnMut(&[f64]) -> Result<f64, E>,
) -> Result<Minimum, E> {
    let n = start.len();
    let dimension = n as f64;
    let damping = 1.0 + dimension / 2.0;
    let target = 2.0 / 11.0;
    let success_rate = 1.0 / 12.0;
    let path_rate = 2.0 / (dimension + 2.0);
    let covariance_rate = 2.0 / (dimension * dimension + 6.0);
    let threshold = 0.44;

    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut unit = move || (f64::from(random.next_u32()) + 0.5) / 4_294_967_296.0;
    let mut normal = move || {
        let radius = (-2.0 * unit().ln()).sqrt();
        radius * (std::f64::consts::TAU * unit()).cos()
    };
    let mut best = Minimum { point: start.to_vec(), value: f(start)? };
    let mut factor = vec![vec![0.0; n]; n];
    (0..n).for_each(|i| factor[i][i] = 1.0);
    let mut inverse = factor.clone();
    let (mut sigma, mut success, mut path) = (bound / 3.0, target, vec![0.0; n]);
    for _ in 1..budget {
        let z: Vec<f64> = (0..n).map(|_| normal()).collect();
        let step = times(&factor, &z);
        let point: Vec<f64> = best
            .point
            .iter()
            .zip(&step)
            .map(|(x, s)| (x + sigma * s).clamp(-bound, bound))
            .collect();
        let value = f(&point)?;
        let better = value <= best.value;
        success = (1.0 - success_rate) * success + success_rate * f64::from(u8::from(better));
        sigma *= ((success - target) / (damping * (1.0 - target))).exp();
        if !better {
            continue;
        }
        best = Minimum { point, value };
        let keep = 1.0 - path_rate;
        let fresh = if success < threshold { (path_rate * (2.0 - path_rate)).sqrt() } else { 0.0 };
        path.iter_mut().zip(&step).for_each(|(p, s)| *p = keep * *p + fresh * s);
        let lost = if success < threshold { 0.0 } else { path_rate * (2.0 - path_rate) };
        let a = 1.0 - covariance_rate + covariance_rate * lost;
        update(&mut factor, &mut inverse, &path, a, covariance_rate);
    }
    Ok(best)
}

fn times(m: &[Vec<f64>], x: &[f64]) -> Vec<f64> {
    m.iter().map(|row| row.iter().zip(x).map(|(m, x)| m * x).sum()).collect()
}

/// `M` and its inverse for `a C + b v vᵀ` in place of `C = M Mᵀ`.
fn update(m: &mut [Vec<f64>], inverse: &mut [Vec<f64>], v: &[f64], a: f64, b: f64) {
    let w = times(inverse, v);
    let square: f64 = w.iter().map(|w| w * w).sum();
    if square < 1e-300 {
        return;
    }
    let root = a.sqrt();
    let stretch = (1.0 + b / a * square).sqrt();
    let forward = root / square * (stretch - 1.0);
    let backward = (1.0 - 1.0 / stretch) / (root * square);
    // wᵀ M⁻¹, before the inverse changes.
    let row: Vec<f64> = (0..w.len())
        .map(|j| w.iter().zip(inverse.iter()).map(|(w, row)| w * row[j]).sum())
        .collect();
    for (i, (m, inverse)) in m.iter_mut().zip(inverse.iter_mut()).enumerate() {
        for j in 0..w.len() {
            m[j] = root * m[j] + forward * v[i] * w[j];
            inverse[j] = inverse[j] / root - backward * w[i] * row[j];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bowl turned by 30 degrees and ten times as steep one way.
    fn bowl(x: &[f64]) -> Result<f64, ()> {
        let (c, s) = (0.75_f64.sqrt(), 0.5);
        let (p, q) = (x[0] - 0.8, x[1] + 0.4);
        Ok((c * p + s * q).powi(2) * 100.0 + (c * q - s * p).powi(2) + 3.0)
    }

    #[test]
    fn a_tilted_bowl_is_descended() {
        for seed in 0..5 {
            let found = minimise(&[0.0, 0.0], 1.5, 300, seed, &mut bowl).unwrap();
            assert!(found.value < 3.0 + 1e-3, "seed {seed}: {found:?}");
        }
    }

    #[test]
    fn the_budget_the_bounds_and_the_seed_hold() {
        let mut points: Vec<Vec<f64>> = Vec::new();
        let mut outward = |x: &[f64]| -> Result<f64, ()> {
            points.push(x.to_vec());
            Ok(-x[0] - x[1])
        };
        let found = minimise(&[0.0, 0.0], 1.5, 40, 1, &mut outward).unwrap();
        assert_eq!(points.len(), 40);
        assert_eq!(points[0], [0.0, 0.0]);
        assert!(points.iter().flatten().all(|x| x.abs() <= 1.5));
        assert!(found.value < -2.0, "{found:?}");
        let once = |seed| minimise(&[0.0, 0.0], 1.5, 40, seed, &mut bowl).unwrap();
        assert_eq!(once(3), once(3));
        assert_ne!(once(3), once(4));
    }

    #[test]
    fn the_factor_and_its_inverse_stay_so() {
        let mut m = vec![vec![1.0, 0.0], vec![0.0, 1.0]];
        let mut inverse = m.clone();
        let before = [[1.0, 0.0], [0.0, 1.0]];
        let v = [0.3, -0.8];
        update(&mut m, &mut inverse, &v, 0.9, 0.2);
        for i in 0..2 {
            for j in 0..2 {
                let c: f64 = (0..2).map(|k| m[i][k] * m[j][k]).sum();
                let wanted = 0.9 * before[i][j] + 0.2 * v[i] * v[j];
                assert!((c - wanted).abs() < 1e-12);
                let one: f64 = (0..2).map(|k| m[i][k] * inverse[k][j]).sum();
                assert!((one - before[i][j]).abs() < 1e-12);
            }
        }
    }
}
