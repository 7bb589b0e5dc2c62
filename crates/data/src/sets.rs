//! Evaluation sets: held-out records that are scored apart.

use crate::report::{DataReport, Split};

/// The evaluation sets of a data set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sets {
    /// Their names, in the order of the recipe.
    pub names: Vec<String>,
    /// For each source, the number of its set.
    of_source: Vec<Option<usize>>,
}

impl Sets {
    /// The number of the set that a record of this source is of; none where it is of none.
    pub fn of(&self, source: u32) -> Option<usize> {
        self.of_source.get(source as usize).copied().flatten()
    }
}

impl DataReport {
    /// The evaluation sets that the recipe names.
    pub fn sets(&self) -> Sets {
        let mut sets = Sets::default();
        for source in &self.sources {
            let name = source.set.as_ref().filter(|_| source.split == Split::Valid);
            let number = name.map(|name| {
                sets.names.iter().position(|known| known == name).unwrap_or_else(|| {
                    sets.names.push(name.clone());
                    sets.names.len() - 1
                })
            });
            sets.of_source.push(number);
        }
        sets
    }
}
