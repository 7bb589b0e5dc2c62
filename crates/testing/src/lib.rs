//! What the tests of all crates share: saying that one was skipped.
//!
//! A test that needs what this machine may lack (a program, a large file, a GPU) says so here and
//! returns. With `HYDRALORA_SKIPS` naming a file every skip is noted there, a line each, so that a run
//! can count them; with `HYDRALORA_REQUIRE=all`, or the thing's own name in that list, a skip is a
//! failure.

use std::io::Write;

/// Notes that the test at hand is skipped for want of `thing` (a word, as `sandbox`).
///
/// # Panics
/// If `HYDRALORA_REQUIRE` lists `thing` or `all`.
pub fn skip(thing: &str, why: impl std::fmt::Display) {
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let required = std::env::var("HYDRALORA_REQUIRE").unwrap_or_default();
    let is_required = required.split(',').any(|entry| entry == "all" || entry == thing);
    assert!(!is_required, "HYDRALORA_REQUIRE={required}, but {thing} cannot be had: {why}");
    let line = format!("skipped: {test}: {thing}: {why}").replace('\n', " ");
    #[allow(clippy::print_stderr, reason = "tests tell people")]
    {
        eprintln!("{line}");
    }
    if let Some(path) = std::env::var_os("HYDRALORA_SKIPS") {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&path);
        let noted = file.and_then(|mut file| writeln!(file, "{line}"));
        noted.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}
