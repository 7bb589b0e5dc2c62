//! How a tensor of a GGUF file differs from the same in a Hugging Face checkpoint.

use super::kit::{K_PROJ, Q_PROJ};
use super::{Family, interleaved_row, shift_of};
use crate::config::ModelConfig;
use crate::gguf::GgufFile;
use hydralora_kernels::ops::delta_net::DeltaConfig;

/// How a tensor of a GGUF file differs from the same in a Hugging Face checkpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Layout {
    /// Order of its rows, if it is another.
    pub rows: Option<Order>,
    /// Order of the numbers in a row, if it is another.
    pub columns: Option<Order>,
    /// What the file holds of every number.
    pub numbers: Numbers,
    /// Whether the file leaves out the second of three axes, of extent 1.
    pub squeezed: bool,
}

/// Another order of rows or columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Every head as pairs `(0, d/2, 1, d/2+1, …)`.
    Interleaved {
        /// Number of heads.
        heads: usize,
    },
    /// Heads in groups of `per`: the first of every group, then the second of every group, and so on.
    Tiled {
        /// Where the heads begin; what comes before stays.
        start: usize,
        /// Number of groups.
        groups: usize,
        /// Heads of a group.
        per: usize,
        /// Width of a head.
        width: usize,
    },
}

/// What a file holds of a number `x`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Numbers {
    /// `x`.
    #[default]
    Same,
    /// `x` and this.
    Plus(f32),
    /// `−eˣ`.
    NegativeExp,
}

impl Order {
    /// Gives where in a file the row or column `index` of `len` lies; `len` must have
    /// [no fault](Self::fault).
    pub fn position(self, index: usize, len: usize) -> usize {
        match self {
            Order::Interleaved { heads } => interleaved_row(index, len, heads),
            Order::Tiled { start, .. } if index < start => index,
            Order::Tiled { start, groups, per, width } => {
                let (head, within) = ((index - start) / width, (index - start) % width);
                start + (head % per * groups + head / per) * width + within
            }
        }
    }

    /// Says why `len` rows or columns cannot be in this order, if they cannot.
    pub(crate) fn fault(self, len: usize) -> Option<String> {
        match self {
            Order::Interleaved { heads } => {
                let two = heads.checked_mul(2).filter(|&two| two > 0);
                let shared = two.is_some_and(|two| len.is_multiple_of(two));
                (!shared)
                    .then(|| format!("{len} rows, which {heads} heads of even width cannot share"))
            }
            Order::Tiled { start, groups, per, width } => {
                let expected = start + groups * per * width;
                (len != expected || width == 0).then(|| {
                    format!("an extent of {len} where its {} heads need {expected}", groups * per)
                })
            }
        }
    }

    /// Gives the order of blocks of `block` neighbours, if such blocks stay whole.
    pub(crate) fn of_blocks(self, block: usize) -> Option<Order> {
        match self {
            _ if block == 1 => Some(self),
            Order::Tiled { start, groups, per, width }
                if start.is_multiple_of(block) && width.is_multiple_of(block) =>
            {
                Some(Order::Tiled { start: start / block, groups, per, width: width / block })
            }
            _ => None,
        }
    }

    /// Puts the rows or columns of a file, `items` of them `size` long, in Hugging Face's order.
    pub(crate) fn restore<T: Copy>(self, items: usize, size: usize, from: &[T], to: &mut [T]) {
        for (index, item) in to.chunks_exact_mut(size.max(1)).enumerate() {
            let at = self.position(index, items) * size;
            item.copy_from_slice(&from[at..at + size]);
        }
    }

    /// Puts `items` rows or columns that are `size` long in a file's order.
    pub fn apply<T: Copy>(self, items: usize, size: usize, from: &[T], to: &mut [T]) {
        for (index, item) in from.chunks_exact(size.max(1)).enumerate() {
            let at = self.position(index, items) * size;
            to[at..at + size].copy_from_slice(item);
        }
    }
}

impl Numbers {
    /// What the file holds of `x`.
    pub(crate) fn write(self, x: f32) -> f32 {
        match self {
            Numbers::Same => x,
            Numbers::Plus(shift) => x + shift,
            Numbers::NegativeExp => -f64::from(x).exp() as f32,
        }
    }

    /// The number of which the file holds `y`.
    pub(crate) fn read(self, y: f32) -> f32 {
        match self {
            Numbers::Same => y,
            Numbers::Plus(shift) => y - shift,
            Numbers::NegativeExp => (-f64::from(y)).ln() as f32,
        }
    }
}

impl Layout {
    /// Tells the layout of the tensor that Hugging Face calls `name`, in files of `family`.
    pub(crate) fn of(family: &dyn Family, name: &str, heads: &Heads) -> Layout {
        let in_layer = || {
            let (index, inside) = name.strip_prefix("model.layers.")?.split_once('.')?;
            index.parse::<usize>().is_ok().then_some(inside)
        };
        let Some(inside) = in_layer() else {
            return Layout { numbers: shifted(family, name), ..Layout::default() };
        };
        let mut layout = family.gguf_layout(inside, heads);
        let module = inside.rsplit_once('.').map_or(inside, |(module, _)| module);
        if family.gguf().interleaved {
            let heads = match module {
                module if module == Q_PROJ.name => heads.query,
                module if module == K_PROJ.name => heads.key,
                _ => None,
            };
            layout.rows = heads.map(|heads| Order::Interleaved { heads }).or(layout.rows);
        }
        if layout.numbers == Numbers::Same {
            layout.numbers = shifted(family, name);
        }
        layout
    }
}

fn shifted(family: &dyn Family, name: &str) -> Numbers {
    match shift_of(family, name) as f32 {
        0.0 => Numbers::Same,
        shift => Numbers::Plus(shift),
    }
}

/// The heads that decide in which order rows and columns are.
#[derive(Clone, Copy, Debug, Default)]
pub struct Heads {
    /// Heads of queries.
    pub query: Option<usize>,
    /// Heads of keys.
    pub key: Option<usize>,
    /// Heads of the delta rule.
    pub delta: Option<DeltaConfig>,
}

impl Heads {
    pub(crate) fn of_config(config: &ModelConfig) -> Self {
        Self {
            query: Some(config.num_attention_heads),
            key: Some(config.num_key_value_heads),
            delta: config.linear_attention.as_ref().map(|of| of.delta()),
        }
    }

    /// Those that the metadata of `file` tell, as far as they do.
    pub(super) fn of_file(file: &GgufFile, architecture: &str) -> Self {
        let count = |key: &str| -> Option<usize> {
            file.get(&format!("{architecture}.{key}"))?.as_u64()?.try_into().ok()
        };
        let query = count("attention.head_count");
        let delta = || {
            let (groups, heads) = (count("ssm.group_count")?, count("ssm.time_step_rank")?);
            let (key, inner) = (count("ssm.state_size")?, count("ssm.inner_size")?);
            // What is refused where the configuration is read must not overflow here.
            let sane = [groups, heads, key, inner].iter().all(|size| (1..=1 << 20).contains(size));
            sane.then_some(DeltaConfig {
                num_key_heads: groups,
                num_value_heads: heads,
                key_head_dim: key,
                value_head_dim: inner / heads,
            })
        };
        Self { query, key: count("attention.head_count_kv").or(query), delta: delta() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_tiled_and_put_back() {
        let order = Order::Tiled { start: 1, groups: 2, per: 3, width: 2 };
        let grouped = ["q", "a0", "a0", "a1", "a1", "a2", "a2", "b0", "b0", "b1", "b1", "b2", "b2"];
        let mut tiled = [""; 13];
        order.apply(13, 1, &grouped, &mut tiled);
        let expected =
            ["q", "a0", "a0", "b0", "b0", "a1", "a1", "b1", "b1", "a2", "a2", "b2", "b2"];
        assert_eq!(tiled, expected);
        let mut again = [""; 13];
        order.restore(13, 1, &tiled, &mut again);
        assert_eq!(again, grouped);
        assert!(order.fault(13).is_none() && order.fault(12).is_some());
        assert_eq!(order.of_blocks(1), Some(order));
        assert_eq!(order.of_blocks(2), None);
        let wide = Order::Tiled { start: 0, groups: 2, per: 3, width: 64 };
        let blocks = Order::Tiled { start: 0, groups: 2, per: 3, width: 2 };
        assert_eq!(wide.of_blocks(32), Some(blocks));
        assert_eq!(wide.of_blocks(256), None);
    }

    #[test]
    fn numbers_come_back() {
        for numbers in [Numbers::Same, Numbers::Plus(1.0), Numbers::NegativeExp] {
            for x in [-3.0f32, 0.0, 0.3, 2.75] {
                assert!((numbers.read(numbers.write(x)) - x).abs() < 1e-6, "{numbers:?} {x}");
            }
        }
        assert_eq!(Numbers::NegativeExp.write(0.0), -1.0);
    }

    /// What is read from a file is written to it again, to the last bit.
    #[test]
    fn files_come_back() {
        for i in 0..100_000 {
            let x = (f64::from(i) * 0.7).sin() as f32 * (i % 97) as f32 / 12.0;
            for numbers in [Numbers::Same, Numbers::Plus(1.0), Numbers::NegativeExp] {
                let y = numbers.write(x);
                assert_eq!(numbers.write(numbers.read(y)), y, "{numbers:?} {x}");
            }
        }
    }
}
