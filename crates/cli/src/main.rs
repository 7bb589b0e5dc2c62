//! The `hydralora` command: recipe → plan → one file a command.

#![forbid(unsafe_code)]

mod adapter;
mod args;
mod calibration;
mod clusters;
mod commands;
mod device;
mod domain;
mod encoder;
mod energy;
mod estimate;
mod exchange_args;
mod failure;
mod features;
mod grown;
mod in_force;
mod memory;
mod output;
mod panics;
mod plan;
mod progress;
mod ranks;
mod recipe;
mod resume;
mod schema;
mod sources;
mod stop;
mod ui;

use args::{Arguments, Command};
use clap::Parser;
use std::process::ExitCode;

/// The static build's C library is musl, whose allocator lets one thread in at a time.
#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            if let Some(advice) = args::recipe_option(&error, std::env::args()) {
                ui::tell(format!("error: {advice}"));
                return ExitCode::from(2);
            }
            error.exit()
        }
    };
    // A server goes on after a panic, so that nothing of it may wait for the end.
    if !matches!(arguments.command, Command::Serve(_)) {
        panics::hold_foreign();
    }
    let run = std::panic::catch_unwind(|| start(&arguments));
    match run {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => {
            ui::tell(format!("error: {error:#}"));
            ExitCode::from(failure::exit_code(&error))
        }
        Err(panic) => {
            if let Some(message) = device::failure(panic.as_ref()) {
                ui::tell(format!("error: {message}"));
                return ExitCode::from(1);
            }
            // The message of a panic of our own is on stderr already.
            panics::tell_held();
            ui::tell("error: this is a fault of hydralora, please report it with the lines above");
            ExitCode::from(1)
        }
    }
}

fn start(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    if let Some(threads) = arguments.global.threads.map(usize::from).or_else(ranks::threads) {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    }
    device::choose(&arguments.global)?;
    if arguments.global.stop_on_eof {
        stop::watch_stdin();
    }
    // As many as rayon has, which reads data and clusters.
    let pool = hydralora_runtime::Pool::new(rayon::current_num_threads());
    pool.enter(|| run(arguments))
}

fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let global = &arguments.global;
    match &arguments.command {
        Command::Quickstart(command) => commands::quickstart::run(global, command),
        Command::Model(command) => commands::model::run(global, command),
        Command::Models => commands::models::run(global),
        Command::Init(command) => commands::init::run(global, command),
        Command::Completions(command) => commands::shell::completions(global, command),
        Command::Man(command) => commands::shell::man(global, command),
        Command::Reference => commands::reference::run(global),
        Command::Schema => commands::init::schema(global),
        Command::Train(command) => commands::train::run(global, command),
        Command::Heads(command) => commands::heads::run(global, command),
        Command::Check(command) => commands::check::run(global, command),
        Command::Generate(command) => commands::generate::run(global, command),
        Command::Chat(command) => commands::chat::run(global, command),
        Command::Serve(command) => commands::serve::run(global, command),
        Command::Eval(command) => commands::eval::run(global, command),
        Command::Inspect(command) => commands::inspect::run(global, command),
        Command::Bench(command) => commands::bench::run(global, command),
        Command::Analyze(command) => commands::analyze::run(global, command),
        Command::Merge(command) => commands::merge::run(global, command),
        Command::Export(command) => commands::export::run(global, command),
        Command::Import(command) => commands::import::run(global, command),
        Command::Compose(command) => commands::compose::run(global, command),
        Command::Study(command) => commands::study::run(global, command),
    }
}
