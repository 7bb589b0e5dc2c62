//! The command line as a user meets it, on the 260K-parameter model.

mod adapters;
mod added_tokens;
mod analyze;
mod architecture;
mod bad_input;
mod bench;
mod commands;
mod device;
mod domains;
mod eval;
mod files;
mod going_on;
mod golden;
mod heads;
mod hostile;
mod hub;
mod interop;
mod meaning;
mod messages;
mod quickstart;
mod recipes;
mod resume;
mod study;
mod support;
mod thinking;
