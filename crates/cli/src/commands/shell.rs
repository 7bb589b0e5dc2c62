//! `hydralora completions` and `hydralora man`: what shells and `man` know of the commands, made from the same
//! declarations as `--help`.

use crate::args::{Arguments, Global};
use crate::failure::bad_input;
use crate::ui::result;
use clap::{Args, Command, CommandFactory};
use clap_complete::Shell;
use serde_json::json;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

/// The name that completions are registered for.
const NAME: &str = "hydralora";

#[derive(Args, Debug)]
pub(crate) struct CompletionsArguments {
    /// The shell
    shell: Shell,
}

#[derive(Args, Debug)]
pub(crate) struct ManArguments {
    /// Folder to write the pages to, one for each command; made if there is none
    #[arg(long, default_value = "man")]
    out: PathBuf,
}

/// Prints the script for a shell.
pub(crate) fn completions(
    global: &Global,
    arguments: &CompletionsArguments,
) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Arguments::command(), NAME, &mut script);
    let script = String::from_utf8(script)?;
    result(
        global,
        &json!({"shell": arguments.shell.to_string(), "script": script}),
        script.trim_end(),
    )?;
    Ok(ExitCode::SUCCESS)
}

/// Writes a page for every command that is shown.
pub(crate) fn man(global: &Global, arguments: &ManArguments) -> anyhow::Result<ExitCode> {
    let folder = &arguments.out;
    fs::create_dir_all(folder)
        .map_err(|error| bad_input(format!("--out: {}: {error}", folder.display())))?;
    let mut root = Arguments::command().disable_help_subcommand(true);
    root.build();
    let mut pages = Vec::new();
    collect(&root, &mut pages)?;
    for (name, page) in &pages {
        hydralora_files::write_file(&folder.join(name), page)?;
    }
    let names: Vec<&str> = pages.iter().map(|(name, _)| name.as_str()).collect();
    let text = format!("{}: {} pages", folder.display(), pages.len());
    result(global, &json!({"out": folder, "pages": names}), &text)?;
    Ok(ExitCode::SUCCESS)
}

/// The pages of a command and of those below it, with their file names.
fn collect(command: &Command, pages: &mut Vec<(String, Vec<u8>)>) -> anyhow::Result<()> {
    if command.is_hide_set() {
        return Ok(());
    }
    let name = command.get_display_name().unwrap_or(command.get_name());
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page)?;
    pages.push((format!("{name}.1"), page));
    for below in command.get_subcommands() {
        collect(below, pages)?;
    }
    Ok(())
}
