//! The best approximation of lower rank of a product `B A` of thin matrices, without forming it.
//!
//! `B = Q_b R_b` and `Aᵀ = Q_a R_a` by Gram and Schmidt, twice for accuracy; then
//! `R_b R_aᵀ = U S Vᵀ` by Jacobi's one-sided rotations, and `B A ≈ (Q_b U S)(Q_a V)ᵀ`, cut to the
//! largest singular values.

/// Columns of equal length.
type Columns = Vec<Vec<f64>>;

/// Rotations whose cosine between columns is below this count as done.
const PARALLEL: f64 = 1e-14;
/// More sweeps than Jacobi's method was ever seen to need.
const SWEEPS: usize = 60;

/// `A: [k, in]` and `B: [out, k]`, row by row, to `A': [rank, in]` with orthonormal rows and
/// `B': [out, rank]`.
pub(super) fn truncated(a: &[f64], b: &[f64], k: usize, rank: usize) -> (Vec<f64>, Vec<f64>) {
    let inputs = a.len() / k;
    let a_columns: Columns = a.chunks_exact(inputs).map(<[f64]>::to_vec).collect();
    let b_columns: Columns =
        (0..k).map(|j| b.iter().skip(j).step_by(k).copied().collect()).collect();
    let (q_a, r_a) = orthogonal(&a_columns);
    let (q_b, r_b) = orthogonal(&b_columns);
    // Column j of R_b R_aᵀ.
    let core: Columns = (0..k)
        .map(|j| (0..k).map(|i| (0..k).map(|l| r_b[l][i] * r_a[l][j]).sum()).collect())
        .collect();
    let (scaled_u, v) = jacobi(core);
    let mut order: Vec<usize> = (0..k).collect();
    order.sort_by(|&x, &y| norm(&scaled_u[y]).total_cmp(&norm(&scaled_u[x])));
    order.truncate(rank);
    let rows: Vec<f64> = order.iter().flat_map(|&c| combine(&q_a, &v[c])).collect();
    let columns: Columns = order.iter().map(|&c| combine(&q_b, &scaled_u[c])).collect();
    let outputs = b.len() / k;
    let b = (0..outputs).flat_map(|row| columns.iter().map(move |c| c[row])).collect();
    (rows, b)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

/// `Σ_i factors[i] · columns[i]`.
fn combine(columns: &Columns, factors: &[f64]) -> Vec<f64> {
    let mut sum = vec![0.0; columns.first().map_or(0, Vec::len)];
    for (column, factor) in columns.iter().zip(factors) {
        sum.iter_mut().zip(column).for_each(|(s, c)| *s += factor * c);
    }
    sum
}

/// Orthonormal columns `Q` (zero where a column depends on those before) and the upper triangle `R`,
/// by columns, with `columns = Q R`.
fn orthogonal(columns: &Columns) -> (Columns, Columns) {
    let k = columns.len();
    let (mut q, mut r): (Columns, Columns) = (Vec::new(), Vec::new());
    for column in columns {
        let whole = norm(column);
        let (mut rest, mut factors) = (column.clone(), vec![0.0; k]);
        for _ in 0..2 {
            for (index, direction) in q.iter().enumerate() {
                let along = dot(direction, &rest);
                factors[index] += along;
                rest.iter_mut().zip(direction).for_each(|(x, d)| *x -= along * d);
            }
        }
        let left = norm(&rest);
        if left > 1e-13 * whole {
            factors[q.len()] = left;
            rest.iter_mut().for_each(|x| *x /= left);
        } else {
            rest.iter_mut().for_each(|x| *x = 0.0);
        }
        q.push(rest);
        r.push(factors);
    }
    (q, r)
}

/// The columns of `U S` and `V` of a square matrix.
fn jacobi(mut m: Columns) -> (Columns, Columns) {
    let k = m.len();
    let mut v: Columns =
        (0..k).map(|j| (0..k).map(|i| f64::from(u8::from(i == j))).collect()).collect();
    for _ in 0..SWEEPS {
        let mut rotated = false;
        for i in 0..k {
            for j in i + 1..k {
                let (alpha, beta, gamma) =
                    (dot(&m[i], &m[i]), dot(&m[j], &m[j]), dot(&m[i], &m[j]));
                if gamma.abs() <= PARALLEL * (alpha * beta).sqrt() {
                    continue;
                }
                rotated = true;
                let zeta = (beta - alpha) / (2.0 * gamma);
                let tangent = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let cosine = 1.0 / (1.0 + tangent * tangent).sqrt();
                let sine = cosine * tangent;
                for columns in [&mut m, &mut v] {
                    let (head, tail) = columns.split_at_mut(j);
                    for (x, y) in head[i].iter_mut().zip(&mut tail[0]) {
                        (*x, *y) = (cosine * *x - sine * *y, sine * *x + cosine * *y);
                    }
                }
            }
        }
        if !rotated {
            break;
        }
    }
    (m, v)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn product(a: &[f64], b: &[f64], k: usize) -> Vec<f64> {
        let inputs = a.len() / k;
        b.chunks_exact(k)
            .flat_map(|row| {
                (0..inputs)
                    .map(|j| (0..k).map(|l| row[l] * a[l * inputs + j]).sum())
                    .collect::<Vec<f64>>()
            })
            .collect()
    }

    fn numbers(count: usize, seed: f64) -> Vec<f64> {
        (0..count).map(|i| ((i as f64 + 1.0) * seed).sin()).collect()
    }

    #[test]
    fn the_full_rank_keeps_the_product() {
        let (k, inputs, outputs) = (4, 7, 5);
        let (a, b) = (numbers(k * inputs, 1.7), numbers(outputs * k, 2.3));
        let (a2, b2) = truncated(&a, &b, k, k);
        for (x, y) in product(&a, &b, k).iter().zip(product(&a2, &b2, k)) {
            assert!((x - y).abs() < 1e-12, "{x} {y}");
        }
    }

    #[test]
    fn a_product_of_lower_rank_is_met_exactly_and_the_error_is_the_rest() {
        // Rank 2 in four columns, two of them copies.
        let (inputs, outputs) = (6, 5);
        let (row0, row1) = (numbers(inputs, 1.1), numbers(inputs, 0.7));
        let a: Vec<f64> = [&row0, &row1, &row0, &row1].into_iter().flatten().copied().collect();
        let b = numbers(outputs * 4, 1.9);
        let (a2, b2) = truncated(&a, &b, 4, 2);
        let whole = product(&a, &b, 4);
        for (x, y) in whole.iter().zip(product(&a2, &b2, 2)) {
            assert!((x - y).abs() < 1e-12, "{x} {y}");
        }
        let (a1, b1) = truncated(&a, &b, 4, 1);
        let error: f64 =
            whole.iter().zip(product(&a1, &b1, 1)).map(|(x, y)| (x - y) * (x - y)).sum();
        // The second singular value is the length of the second column of B'.
        let second: f64 = b2.iter().skip(1).step_by(2).map(|x| x * x).sum();
        assert!((error - second).abs() < 1e-10 && second > 1e-3, "{error} {second}");
    }
}
