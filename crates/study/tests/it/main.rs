//! A study from its file to its report, with a program around it that only pretends to train.

mod fake;
mod flow;
mod scale;
