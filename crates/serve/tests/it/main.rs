//! The server over real sockets, with a small trained model.

mod adapters;
mod client;
mod clients;
mod mutated;
mod protocol;
mod soak;
mod support;
