//! How well two groupings of the same things agree.

use serde::Serialize;

/// Agreement of clusters with labels that were there before.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Agreement {
    /// Adjusted Rand index (Hubert, Arabie 1985): 1 for the same grouping, about 0 by chance.
    pub adjusted_rand: f64,
    /// Normalised mutual information, by the arithmetic mean of the entropies: 0 to 1.
    pub normalized_mutual_information: f64,
}

/// Counts every pair of groups: `[a][b]`.
fn table(a: &[u32], b: &[u32]) -> Vec<Vec<usize>> {
    let groups = |labels: &[u32]| labels.iter().max().map_or(0, |&most| most as usize + 1);
    let mut table = vec![vec![0; groups(b)]; groups(a)];
    for (&a, &b) in a.iter().zip(b) {
        table[a as usize][b as usize] += 1;
    }
    table
}

impl Agreement {
    /// Compares two groupings of the same things, of equal length.
    pub fn of(a: &[u32], b: &[u32]) -> Self {
        Self::in_table(&table(a, b))
    }

    /// Compares the groupings whose pairs of groups `table` counts.
    pub fn in_table(table: &[Vec<usize>]) -> Self {
        let rows: Vec<usize> = table.iter().map(|row| row.iter().sum()).collect();
        let columns: Vec<usize> = (0..table.first().map_or(0, Vec::len))
            .map(|column| table.iter().map(|row| row[column]).sum())
            .collect();
        let pairs = |n: usize| n as f64 * (n as f64 - 1.0) / 2.0;
        let sum = |counts: &[usize]| counts.iter().map(|&n| pairs(n)).sum::<f64>();
        let (of_rows, of_columns) = (sum(&rows), sum(&columns));
        let both: f64 = table.iter().map(|row| sum(row)).sum();
        let things: usize = rows.iter().sum();
        let total = pairs(things);
        let expected = if total > 0.0 { of_rows * of_columns / total } else { 0.0 };
        let most = (of_rows + of_columns) / 2.0;
        // Both put all together, or both keep all apart: the same grouping.
        let adjusted_rand = if (most - expected).abs() < 1e-12 {
            1.0
        } else {
            (both - expected) / (most - expected)
        };

        let count = things.max(1) as f64;
        let entropy = |counts: &[usize]| {
            let parts = counts.iter().filter(|n| **n > 0).map(|&n| n as f64 / count);
            parts.map(|p| -p * p.ln()).sum::<f64>()
        };
        let mut mutual = 0.0;
        for (row, &of_row) in table.iter().zip(&rows) {
            for (&n, &of_column) in row.iter().zip(&columns).filter(|(n, _)| **n > 0) {
                let n = n as f64;
                mutual += n / count * (n * count / (of_row as f64 * of_column as f64)).ln();
            }
        }
        let mean = (entropy(&rows) + entropy(&columns)) / 2.0;
        let normalized_mutual_information =
            if mean < 1e-12 { 1.0 } else { (mutual / mean).clamp(0.0, 1.0) };
        Self { adjusted_rand, normalized_mutual_information }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        let same = Agreement::of(&[0, 0, 1, 1], &[1, 1, 0, 0]);
        assert!((same.adjusted_rand - 1.0).abs() < 1e-12);
        assert!((same.normalized_mutual_information - 1.0).abs() < 1e-12);
        // scikit-learn: adjusted_rand_score and normalized_mutual_info_score of the same lists.
        let partly = Agreement::of(&[0, 0, 1, 1], &[0, 0, 1, 2]);
        assert!((partly.adjusted_rand - 0.571_428_571_428_571_4).abs() < 1e-12);
        assert!((partly.normalized_mutual_information - 0.8).abs() < 1e-12);
        let against = Agreement::of(&[0, 0, 1, 1], &[0, 1, 0, 1]);
        assert!((against.adjusted_rand + 0.5).abs() < 1e-12);
        assert!(against.normalized_mutual_information < 1e-12);
        assert_eq!(Agreement::of(&[0; 5], &[0; 5]).adjusted_rand, 1.0);
        assert_eq!(Agreement::of(&[], &[]).adjusted_rand, 1.0);
    }
}
