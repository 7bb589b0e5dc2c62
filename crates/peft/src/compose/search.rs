//! A minimum without gradients, of few evaluations: Powell's BOBYQA, which goes where a quadratic
//! model of the values so far is least.

use bobyqa::{Config, bobyqa};

/// What was found.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Minimum {
    pub(super) point: Vec<f64>,
    pub(super) value: f64,
}

/// Searches from `start` inside `[-bound, bound]` per coordinate, with at most `budget` evaluations
/// of `f`, the first of them at the start. It ends sooner once steps are
/// down to `bound / 10000`.
///
/// # Errors
/// Whatever `f` says, at once.
pub(super) fn minimise<E>(
    start: &[f64],
    bound: f64,
    budget: usize,
    f: &mut dyn FnMut(&[f64]) -> Result<f64, E>,
) -> Result<Minimum, E> {
    let n = start.len();
    let mut config = Config::new(n);
    // The fewest points that it takes: the usual 2n + 1 leave no steps of forty evaluations for n = 20.
    config.npt = n + 2;
    config.rho_begin = bound / 3.0;
    config.rho_end = bound / 1e4;
    // Smaller budgets it refuses; they end by the value below.
    config.max_fun = budget.max(config.npt + 1);
    config.f_target = f64::MIN;
    const END: f64 = f64::NEG_INFINITY;

    let mut left = budget;
    let mut best: Option<Minimum> = None;
    let mut fault = None;
    let objective = |point: &[f64]| {
        if left == 0 || fault.is_some() {
            return END;
        }
        left -= 1;
        match f(point) {
            Ok(value) => {
                if best.as_ref().is_none_or(|best| value < best.value) {
                    best = Some(Minimum { point: point.to_vec(), value });
                }
                value
            }
            Err(error) => {
                fault = Some(error);
                END
            }
        }
    };
    bobyqa(objective, &mut start.to_vec(), &vec![-bound; n], &vec![bound; n], config);
    match (fault, best) {
        (Some(error), _) => Err(error),
        (None, Some(best)) => Ok(best),
        // Without coordinates there is nothing to search.
        (None, None) => Ok(Minimum { point: start.to_vec(), value: f(start)? }),
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
        let found = minimise(&[0.0, 0.0], 1.5, 40, &mut bowl).unwrap();
        assert!(found.value < 3.0 + 1e-3, "{found:?}");
        assert_eq!(minimise(&[0.0, 0.0], 1.5, 40, &mut bowl).unwrap(), found);
    }

    /// As LoRAHub's loss: turning all signs round changes nothing, and the penalty rises from zero.
    #[test]
    fn a_start_between_two_equal_minima_is_left() {
        let wanted: Vec<f64> = (0..20).map(|i| [0.8, -0.3, 0.1][i % 3]).collect();
        let mut twin = |x: &[f64]| -> Result<f64, ()> {
            let dot: f64 = x.iter().zip(&wanted).map(|(x, w)| x * w).sum();
            let size = x.iter().map(|x| x.abs()).sum::<f64>() / 20.0;
            Ok((dot * dot - 1.0).powi(2) + 0.05 * size)
        };
        let found = minimise(&[0.0; 20], 1.5, 40, &mut twin).unwrap();
        assert!(found.value < 0.05, "{found:?}");
    }

    #[test]
    fn the_budget_and_the_bounds_hold() {
        for (n, budget) in [(1, 1), (1, 40), (2, 3), (2, 40), (20, 40), (60, 40)] {
            let mut points: Vec<Vec<f64>> = Vec::new();
            let mut outward = |x: &[f64]| -> Result<f64, ()> {
                points.push(x.to_vec());
                Ok(-x.iter().sum::<f64>())
            };
            let found = minimise(&vec![0.0; n], 1.5, budget, &mut outward).unwrap();
            assert!(points.len() <= budget, "{} for {n}", points.len());
            assert_eq!(points[0], vec![0.0; n]);
            assert!(points.iter().flatten().all(|x| x.abs() <= 1.5));
            assert!(points.contains(&found.point));
            if (n, budget) == (2, 40) {
                assert!(found.value < -2.999, "{found:?}");
            }
        }
        let alone = minimise(&[], 1.5, 40, &mut |_| Ok::<_, ()>(7.0)).unwrap();
        assert_eq!(alone, Minimum { point: vec![], value: 7.0 });
    }

    #[test]
    fn an_error_ends_the_search_at_once() {
        let mut count = 0;
        let mut failing = |_: &[f64]| {
            count += 1;
            if count == 7 { Err("no more") } else { Ok(f64::INFINITY) }
        };
        assert_eq!(minimise(&[0.0; 5], 1.5, 40, &mut failing), Err("no more"));
        assert_eq!(count, 7);
    }
}
