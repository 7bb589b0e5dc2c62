//! `hydralora chat`: a conversation on the terminal.

use super::generate::{Opened, Shown, sampling, with_arguments};
use crate::args::{ChatArguments, Global};
use crate::failure::bad_input;
use crate::plan::encode_chat;
use crate::ui::say;
use hydralora_data::{ChatTemplate, Message};
use hydralora_run::engine::{Error, Refused};
use hydralora_run::{Finish, Generator, Request, Sampling};
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use std::io::{BufRead, IsTerminal};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const HELP: &str = "\
/new     start over
/retry   answer the last message again, with other draws
/help    this list
/quit    end, as Ctrl-D does
Ctrl-C ends an answer. A message that begins with a slash is written with two.";

pub(crate) fn run(global: &Global, arguments: &ChatArguments) -> anyhow::Result<ExitCode> {
    let sampling = sampling(&arguments.sampling)?;
    let opened = Opened::new(global, &arguments.model, false)?;
    let template = opened
        .in_force
        .template
        .clone()
        .ok_or_else(|| bad_input("the model has no chat template to talk with"))?;
    let template = with_arguments(global, template, &arguments.template)?;
    let terminal = std::io::stdin().is_terminal();
    let mut conversation = Conversation {
        global,
        arguments,
        opened: &opened,
        template,
        sampling,
        system: arguments.system.iter().map(Message::system).collect(),
        turns: Vec::new(),
        // What a turn has in common with the one before is not read again.
        generator: opened.generator(true),
        cancelled: Arc::new(AtomicBool::new(false)),
    };
    let mut lines = Lines::new(terminal)?;
    if terminal {
        say(global, HELP);
        conversation.cancel_on_interrupt();
    }
    while let Some(line) = lines.next()? {
        if !conversation.take(line.trim())? {
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Where lines come from: an editor with history on a terminal, otherwise stdin as it is.
enum Lines {
    Editor(Box<DefaultEditor>),
    Stdin,
}

impl Lines {
    fn new(terminal: bool) -> anyhow::Result<Self> {
        Ok(if terminal { Self::Editor(Box::new(DefaultEditor::new()?)) } else { Self::Stdin })
    }

    /// The next line; none at the end.
    fn next(&mut self) -> anyhow::Result<Option<String>> {
        match self {
            Self::Editor(editor) => loop {
                match editor.readline("> ") {
                    Ok(line) => {
                        if !line.trim().is_empty() {
                            editor.add_history_entry(&line)?;
                        }
                        return Ok(Some(line));
                    }
                    // It clears the line, as in a shell.
                    Err(ReadlineError::Interrupted) => {}
                    Err(ReadlineError::Eof) => return Ok(None),
                    Err(error) => return Err(error.into()),
                }
            },
            Self::Stdin => {
                let mut line = String::new();
                let read = std::io::stdin().lock().read_line(&mut line)?;
                Ok((read > 0).then_some(line))
            }
        }
    }
}

struct Conversation<'a> {
    global: &'a Global,
    arguments: &'a ChatArguments,
    opened: &'a Opened,
    template: ChatTemplate,
    sampling: Sampling,
    system: Vec<Message>,
    turns: Vec<Message>,
    generator: Generator<'a>,
    /// Set by Ctrl-C while an answer is written.
    cancelled: Arc<AtomicBool>,
}

impl Conversation<'_> {
    /// Lets Ctrl-C end an answer; a second one while nothing is written yet ends the program.
    fn cancel_on_interrupt(&self) {
        let cancelled = self.cancelled.clone();
        let handler = move || {
            if cancelled.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
        };
        // Without a handler Ctrl-C ends the program.
        let _ = ctrlc::set_handler(handler);
    }

    /// Takes a line: a command or a message to answer. False to end.
    fn take(&mut self, line: &str) -> anyhow::Result<bool> {
        match line {
            "" => {}
            "/quit" | "/exit" => return Ok(false),
            "/help" => say(self.global, HELP),
            "/new" => self.turns.clear(),
            "/retry" => {
                if self.turns.last().is_some_and(Message::is_assistant) {
                    self.turns.pop();
                }
                if self.turns.is_empty() {
                    say(self.global, "there is nothing to answer yet");
                } else {
                    self.answer()?;
                }
            }
            _ => match line.strip_prefix('/') {
                Some(message) if !message.starts_with('/') => {
                    say(self.global, format!("{line} is no command\n{HELP}"));
                }
                message => {
                    self.turns.push(Message::user(message.unwrap_or(line)));
                    self.answer()?;
                }
            },
        }
        Ok(true)
    }

    /// Answers the last message.
    fn answer(&mut self) -> anyhow::Result<()> {
        let messages: Vec<Message> = self.system.iter().chain(&self.turns).cloned().collect();
        let prompt = encode_chat(self.opened.base.tokenizer(), &self.template, &messages)?;
        self.cancelled.store(false, Ordering::Relaxed);
        let request = Request {
            prompt: &prompt,
            sampling: self.sampling,
            max_new_tokens: self.arguments.sampling.max_new_tokens,
            stops: &self.arguments.sampling.stops,
            continues: false,
        };
        // The next answer gets draws of its own.
        self.sampling.seed = self.sampling.seed.wrapping_add(1);
        let cancelled = self.cancelled.clone();
        let mut shown = Shown::default();
        let mut watch = |piece: &str| shown.piece(piece) && !cancelled.load(Ordering::Relaxed);
        let generation = match self.generator.generate(request, &mut watch) {
            Ok(generation) => generation,
            Err(error @ Error::Refused(Refused::TooLong { .. })) => {
                say(self.global, format!("{error}; /new starts over"));
                self.turns.pop();
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        shown.piece("\n");
        shown.end()?;
        match generation.finish {
            Finish::Length => say(self.global, "(cut off at the limit)"),
            Finish::Cancelled => say(self.global, "(stopped)"),
            Finish::Stop => {}
        }
        self.turns.push(Message::assistant(&generation.text));
        Ok(())
    }
}
