//! The command reference of the guide, made from the program's own help.

use crate::args::{Arguments, Global};
use crate::ui::result;
use clap::{Command, CommandFactory};
use serde_json::json;
use std::fmt::Write as _;
use std::process::ExitCode;

/// Columns of the help texts.
const WIDTH: usize = 110;
/// Options that stand once at the beginning instead of with every command.
const GLOBAL: [&str; 4] = ["device", "threads", "json", "quiet"];

pub(crate) fn run(global: &Global) -> anyhow::Result<ExitCode> {
    let mut root = Arguments::command().term_width(WIDTH).disable_help_subcommand(true);
    root.build();
    let mut out = String::from(
        "# Commands\n\nWhat `hydralora help COMMAND` says, for every command; `hydralora reference` makes this page.\n\n\
         A command exits with 0 when it did what it was asked, 2 when something it was given is wrong, 1 when it failed \
         otherwise, and 130 when it was interrupted. What it found goes to stdout, with `--json` as one JSON document; \
         everything else goes to stderr.\n",
    );
    section(&mut out, &mut root.clone(), 2);
    for command in root.get_subcommands() {
        commands(&mut out, command, 2);
    }
    result(global, &json!({"markdown": out}), out.trim_end())?;
    Ok(ExitCode::SUCCESS)
}

/// A command's section, and those of the commands below it.
fn commands(out: &mut String, command: &Command, level: usize) {
    if command.is_hide_set() {
        return;
    }
    let mut own = command.clone().term_width(WIDTH);
    for name in GLOBAL {
        own = own.mut_args(|arg| if arg.get_id() == name { arg.hide(true) } else { arg });
    }
    section(out, &mut own, level);
    for below in command.get_subcommands() {
        commands(out, below, level + 1);
    }
}

fn section(out: &mut String, command: &mut Command, level: usize) {
    let name = command.get_bin_name().unwrap_or(command.get_name()).to_owned();
    let help = command.render_long_help().to_string();
    let lines: Vec<&str> = help.lines().map(str::trim_end).collect();
    let _ = write!(
        out,
        "\n{} `{name}`\n\n```text\n{}\n```\n",
        "#".repeat(level),
        lines.join("\n").trim()
    );
}
