//! The progress bar of a training run.

use crate::ui::tell;
use hydralora_train::{Event, Result, Sink};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::collections::VecDeque;
use std::io::IsTerminal;
use std::time::Duration;

/// Steps whose loss the bar averages.
const WINDOW: usize = 10;

/// Shows loss, speed and time left. Where stderr is no terminal it prints a line now and then.
pub(crate) struct Progress {
    bar: ProgressBar,
    terminal: bool,
    recent: VecDeque<f64>,
    total: usize,
    first: usize,
    started: std::time::Instant,
}

impl Progress {
    pub(crate) fn new(quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal() && !quiet;
        let bar = ProgressBar::new(0);
        if !terminal {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        let style = "{bar:28.cyan/dim} {pos}/{len}  {msg}";
        bar.set_style(
            ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        Self {
            bar,
            terminal: terminal || quiet,
            recent: VecDeque::new(),
            total: 0,
            first: 0,
            started: std::time::Instant::now(),
        }
    }

    fn line(&self, line: String) {
        if self.terminal {
            self.bar.println(hydralora_data::shown(&line));
        } else {
            tell(line);
        }
    }
}

impl Sink for Progress {
    fn record(&mut self, event: &Event) -> Result<()> {
        match event {
            Event::Started { step, total_steps } => {
                self.total = *total_steps;
                self.first = *step;
                self.started = std::time::Instant::now();
                self.bar.set_length(*total_steps as u64);
                self.bar.set_position(*step as u64);
                if *step > 0 {
                    self.line(format!("going on after step {step}"));
                }
            }
            Event::Step(metrics) => {
                self.recent.push_back(metrics.loss);
                if self.recent.len() > WINDOW {
                    self.recent.pop_front();
                }
                let loss = self.recent.iter().sum::<f64>() / self.recent.len() as f64;
                let done = (metrics.step - self.first).max(1);
                let per_step = self.started.elapsed().as_secs_f64() / done as f64;
                let left = per_step * (self.total - metrics.step) as f64;
                let left = Duration::from_secs(left as u64);
                let text = format!(
                    "loss {loss:.4}  {:.0} tokens/s  {} left",
                    metrics.tokens_per_s,
                    indicatif::HumanDuration(left)
                );
                self.bar.set_position(metrics.step as u64);
                self.bar.set_message(text.clone());
                let every = (self.total / 10).max(1);
                if !self.terminal && (metrics.step % every == 0 || metrics.step == self.total) {
                    self.line(format!("step {}/{}  {text}", metrics.step, self.total));
                }
            }
            Event::Evaluated { step, evaluation, best } => {
                let domains: Vec<String> = evaluation
                    .domains
                    .iter()
                    .map(|d| format!("{} {:.4}", d.domain, d.loss))
                    .collect();
                let sets = evaluation.sets.iter();
                let sets = sets.map(|of| format!("[{}] {:.4}", of.set, of.loss));
                let domains: Vec<String> = domains.into_iter().chain(sets).collect();
                let mark = if *best { "  (best)" } else { "" };
                self.line(format!(
                    "step {step}  held-out loss {:.4}{mark}  {}",
                    evaluation.loss,
                    domains.join("  ")
                ));
            }
            Event::Saved { .. } => {}
            Event::Note(note) => self.line(format!("note: {note}")),
        }
        Ok(())
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
