//! The commands, one file each.

pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod check;
pub(crate) mod eval;
pub(crate) mod generate;
pub(crate) mod heads;
pub(crate) mod inspect;
pub(crate) mod model;
pub(crate) mod quickstart;
pub(crate) mod train;
