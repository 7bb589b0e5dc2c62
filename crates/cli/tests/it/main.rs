//! The command line as a user meets it, on the 260K-parameter model.

mod architecture;
mod bad_input;
mod bench;
mod commands;
mod device;
mod domains;
mod eval;
mod golden;
mod heads;
mod interop;
mod meaning;
mod quickstart;
mod resume;
mod support;
