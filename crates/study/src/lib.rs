//! Studies: grids of runs as cells on disk, worked on by any number of processes, with statistics, pictures
//! and a report.
//!
//! The crate knows no model and no method. What it needs of the program around it are two traits:
//! [`host::Recipes`] reads recipes for a plan, [`host::Runner`] does a cell's work.
//!
//! | step | module |
//! | --- | --- |
//! | the study file | [`spec`] |
//! | axes to points, constraints, parted data, cells | [`mod@plan`] |
//! | the folder of a study | [`store`] |
//! | who works on which cell | [`claim`], [`work`] |
//! | which value of the tuned axis is best | [`choose`] |
//! | what a cell gave | [`result`] |
//! | means, intervals, tests | [`stats`] |
//! | page, Markdown, pictures, tables | [`report`] |
//! | lines for schedulers | [`mod@export`] |

#![forbid(unsafe_code)]

pub mod choose;
pub mod claim;
mod columns;
mod constraints;
mod disk;
mod error;
pub mod export;
mod grid;
pub mod host;
pub mod plan;
pub mod report;
pub mod result;
pub mod spec;
mod split;
pub mod stats;
pub mod store;
pub mod work;

pub use disk::sha256_of;
pub use error::{Error, Result};
