//! The command line as a user meets it, on the 260K-parameter model.

mod added_tokens;
mod architecture;
mod bad_input;
mod bench;
mod commands;
mod device;
mod domains;
mod eval;
mod files;
mod golden;
mod heads;
mod hostile;
mod interop;
mod meaning;
mod messages;
mod quickstart;
mod resume;
mod study;
mod support;
mod thinking;
