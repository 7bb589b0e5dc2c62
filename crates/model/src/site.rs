//! Names and places of a decoder's linear layers and norms.
//!
//! A family declares the linear layers that its decoder layers have, under the names of its checkpoints;
//! there is no closed list of them. What an adapter's presets ask (which layers compute queries, which
//! belong to the feed-forward block) is answered by the [`Kind`] of each.

use crate::family;
use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::str::FromStr;

/// What a linear layer computes: a set, because a fused layer computes several things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind(u16);

impl Kind {
    /// Attention queries.
    pub const QUERY: Kind = Kind(1);
    /// Attention keys.
    pub const KEY: Kind = Kind(1 << 1);
    /// Attention values.
    pub const VALUE: Kind = Kind(1 << 2);
    /// The output of an attention block.
    pub const OUTPUT: Kind = Kind(1 << 3);
    /// The gate of a feed-forward block.
    pub const GATE: Kind = Kind(1 << 4);
    /// The up-projection of a feed-forward block.
    pub const UP: Kind = Kind(1 << 5);
    /// The down-projection of a feed-forward block.
    pub const DOWN: Kind = Kind(1 << 6);
    /// What steers a recurrent state, or gates what attention gives.
    pub const STATE: Kind = Kind(1 << 7);
    /// What mixes embeddings of a layer's own into the residual stream.
    pub const LAYER_EMBEDDING: Kind = Kind(1 << 8);
    /// Everything of an attention block.
    pub const ATTENTION: Kind =
        Kind::QUERY.and(Kind::KEY).and(Kind::VALUE).and(Kind::OUTPUT).and(Kind::STATE);
    /// Everything of a feed-forward block.
    pub const FEED_FORWARD: Kind = Kind::GATE.and(Kind::UP).and(Kind::DOWN);
    /// Everything.
    pub const ALL: Kind = Kind::ATTENTION.and(Kind::FEED_FORWARD).and(Kind::LAYER_EMBEDDING);

    /// Joins two sets.
    #[must_use]
    pub const fn and(self, other: Kind) -> Kind {
        Kind(self.0 | other.0)
    }

    /// Tells whether the sets share a member.
    pub const fn overlaps(self, other: Kind) -> bool {
        self.0 & other.0 != 0
    }
}

/// Hashes a name by FNV-1a: the same number in every run and release, whatever else the model has.
pub fn name_hash(name: impl fmt::Display) -> u64 {
    struct Fnv(u64);
    impl fmt::Write for Fnv {
        fn write_str(&mut self, text: &str) -> fmt::Result {
            for byte in text.bytes() {
                self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x100_0000_01B3);
            }
            Ok(())
        }
    }
    let mut hash = Fnv(0xCBF2_9CE4_8422_2325);
    // The writer never fails.
    let _ = fmt::write(&mut hash, format_args!("{name}"));
    hash.0
}

/// A linear layer as a family declares it.
#[derive(Debug)]
pub struct Linear {
    /// The name inside a decoder layer, as in the checkpoint: `self_attn.q_proj`.
    pub name: &'static str,
    /// What it computes.
    pub kind: Kind,
    /// Its place among the linear layers of a decoder layer: adapters keep and write their tensors
    /// in this order.
    pub order: u8,
    /// Whether the model has one of it, outside its decoder layers. Such a layer counts to the first.
    pub outside: bool,
}

impl Linear {
    /// Declares a linear layer of decoder layers.
    pub const fn new(name: &'static str, kind: Kind, order: u8) -> Self {
        Self { name, kind, order, outside: false }
    }

    /// Declares a linear layer outside the decoder layers.
    pub const fn outside(name: &'static str, kind: Kind) -> Self {
        Self { name, kind, order: 0, outside: true }
    }

    /// The name of the block it belongs to: `self_attn`, `mlp`. A layer of no block is one by itself.
    pub fn block(&self) -> &'static str {
        self.name.rsplit_once('.').map_or(self.name, |(block, _)| block)
    }

    /// The last part of its name, as PEFT's `target_modules` lists it: `q_proj`.
    pub fn module(&self) -> &'static str {
        self.name.rsplit_once('.').map_or(self.name, |(_, module)| module)
    }
}

/// One linear layer of a decoder, displayed as its checkpoint name
/// (`model.layers.3.mlp.gate_proj`).
#[derive(Clone, Copy)]
pub struct Site {
    /// Index of the decoder layer.
    pub layer: usize,
    /// Which linear layer of it.
    pub linear: &'static Linear,
}

impl Site {
    /// What the layer computes.
    pub fn kind(self) -> Kind {
        self.linear.kind
    }

    /// Tells whether the layer belongs to an attention block.
    pub fn is_attention(self) -> bool {
        self.kind().overlaps(Kind::ATTENTION)
    }

    /// The checkpoint name of the block it belongs to: `model.layers.3.mlp`.
    pub fn block(self) -> String {
        match self.linear.outside {
            true => format!("model.{}", self.linear.block()),
            false => format!("model.layers.{}.{}", self.layer, self.linear.block()),
        }
    }

    /// Hashes the checkpoint name; see [`name_hash`].
    pub fn name_hash(self) -> u64 {
        name_hash(self)
    }

    fn key(&self) -> (usize, u8, &'static str) {
        (self.layer, self.linear.order, self.linear.name)
    }
}

impl PartialEq for Site {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Site {}

impl PartialOrd for Site {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Site {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

impl Hash for Site {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.linear.outside {
            true => write!(f, "model.{}", self.linear.name),
            false => write!(f, "model.layers.{}.{}", self.layer, self.linear.name),
        }
    }
}

impl fmt::Debug for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Site({self})")
    }
}

impl FromStr for Site {
    type Err = ();

    /// Finds the linear layer of that checkpoint name among those that any family declares.
    fn from_str(name: &str) -> Result<Self, ()> {
        let named = |name: &str, outside: bool| {
            let mut all = family::linears();
            all.find(|linear| linear.name == name && linear.outside == outside).ok_or(())
        };
        let Some(rest) = name.strip_prefix("model.layers.") else {
            let linear = named(name.strip_prefix("model.").ok_or(())?, true)?;
            return Ok(Site { layer: 0, linear });
        };
        let (layer, rest) = rest.split_once('.').ok_or(())?;
        let layer = layer.parse().map_err(|_| ())?;
        Ok(Site { layer, linear: named(rest, false)? })
    }
}

/// A site and the widths of its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SiteShape {
    /// Which layer.
    pub site: Site,
    /// Input width.
    pub in_features: usize,
    /// Output width.
    pub out_features: usize,
}

/// A tensor of the decoder that is no linear layer: the weight of a norm, a list of numbers. Displayed as
/// its checkpoint name (`model.layers.3.input_layernorm.weight`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TensorSite {
    /// Index of the decoder layer; none outside the layers.
    pub layer: Option<usize>,
    /// The name inside the decoder layer, or inside the model: of the module, or of the tensor if it
    /// belongs to none.
    pub name: &'static str,
    /// Whether it is the weight of a module.
    pub is_weight: bool,
}

impl TensorSite {
    /// The norm before the output layer.
    pub const FINAL_NORM: TensorSite = TensorSite { layer: None, name: "norm", is_weight: true };
}

impl fmt::Display for TensorSite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.layer {
            Some(layer) => write!(f, "model.layers.{layer}.{}", self.name)?,
            None => write!(f, "model.{}", self.name)?,
        }
        if self.is_weight { f.write_str(".weight") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::kit::{GATE_PROJ, Q_PROJ};

    #[test]
    fn names_round_trip() {
        for linear in family::linears() {
            let site = Site { layer: if linear.outside { 0 } else { 12 }, linear };
            assert_eq!(site.to_string().parse(), Ok(site));
        }
        let gate = Site { layer: 3, linear: &GATE_PROJ };
        assert_eq!(gate.to_string(), "model.layers.3.mlp.gate_proj");
        assert_eq!(gate.block(), "model.layers.3.mlp");
        for wrong in ["model.layers.3.mlp.q_proj", "model.layers.x.mlp.up_proj", "lm_head"] {
            assert_eq!(wrong.parse::<Site>(), Err(()));
        }
    }

    #[test]
    fn equal_names_are_declared_alike() {
        for one in family::linears() {
            for other in family::linears().filter(|other| other.name == one.name) {
                assert_eq!((one.kind, one.order), (other.kind, other.order), "{}", one.name);
            }
        }
    }

    #[test]
    fn a_hash_depends_on_the_name_alone() {
        // Masks of dropout follow from it: it may never change.
        let hash = |layer| Site { layer, linear: &Q_PROJ }.name_hash();
        assert_ne!(hash(1), hash(11));
        assert_eq!(hash(0), 7_264_737_673_621_695_787);
    }
}
