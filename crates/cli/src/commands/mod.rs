//! The commands, one file each.

pub(crate) mod analyze;
mod batch;
pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod check;
pub(crate) mod compose;
pub(crate) mod eval;
pub(crate) mod export;
pub(crate) mod generate;
pub(crate) mod heads;
pub(crate) mod import;
pub(crate) mod init;
pub(crate) mod inspect;
pub(crate) mod merge;
pub(crate) mod model;
pub(crate) mod models;
pub(crate) mod quickstart;
pub(crate) mod reference;
pub(crate) mod serve;
pub(crate) mod shell;
pub(crate) mod study;
mod table;
pub(crate) mod train;
