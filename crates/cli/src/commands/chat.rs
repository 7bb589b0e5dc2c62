//! `hydralora chat`: a conversation on the terminal.

use super::generate::{Opened, print_piece, sampling, with_arguments};
use crate::args::{ChatArguments, Global};
use crate::failure::bad_input;
use crate::plan::encode_chat;
use crate::ui::say;
use hydralora_data::Message;
use hydralora_run::Finish;
use std::io::{BufRead, IsTerminal};
use std::process::ExitCode;

const HELP: &str = "/new starts over, /quit or Ctrl-D ends";

pub(crate) fn run(global: &Global, arguments: &ChatArguments) -> anyhow::Result<ExitCode> {
    let sampling = sampling(&arguments.sampling)?;
    let opened = Opened::new(global, &arguments.model, false)?;
    let template = opened
        .in_force
        .template
        .clone()
        .ok_or_else(|| bad_input("the model has no chat template to talk with"))?;
    let template = with_arguments(global, template, &arguments.template)?;
    let system: Vec<Message> = arguments.system.iter().map(Message::system).collect();
    let decoder = &opened.base.decoder;
    let (mut messages, mut cache, mut seen) = (system.clone(), decoder.new_cache(), Vec::new());
    let stdin = std::io::stdin();
    let terminal = stdin.is_terminal() && !global.quiet;
    if terminal {
        say(global, HELP);
    }
    loop {
        if terminal {
            eprint!("> ");
        }
        let mut line = String::new();
        if stdin.lock().read_line(&mut line)? == 0 {
            return Ok(ExitCode::SUCCESS);
        }
        match line.trim() {
            "" => continue,
            "/quit" => return Ok(ExitCode::SUCCESS),
            "/new" => {
                (messages, cache) = (system.clone(), decoder.new_cache());
                seen.clear();
                continue;
            }
            text => messages.push(Message::user(text)),
        }
        let prompt: Vec<u32> = encode_chat(opened.base.tokenizer(), &template, &messages)?;
        // What the cache holds already need not be computed again, up to the first difference.
        let common = prompt.iter().zip(&seen).take_while(|(a, b)| a == b).count();
        let common = common.min(prompt.len() - 1);
        cache.truncate(common);
        let common = cache.len();
        let limit = arguments.sampling.max_new_tokens;
        let answer = opened.generator().generate(
            &prompt[common..],
            &mut cache,
            sampling,
            limit,
            &mut print_piece,
        );
        let generation = match answer {
            Ok(generation) => generation,
            Err(error @ hydralora_model::Error::ContextExceeded { .. }) => {
                say(global, format!("{error}; /new starts over"));
                messages.pop();
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        print_piece("\n");
        if generation.finish == Finish::Length {
            say(global, "(cut off at the limit)");
        }
        seen = prompt;
        seen.extend(&generation.tokens);
        seen.truncate(cache.len());
        messages.push(Message::assistant(&generation.text));
    }
}
