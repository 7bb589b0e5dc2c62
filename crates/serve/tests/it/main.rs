//! The server over real sockets, with a small trained model.

mod adapters;
mod clients;
mod protocol;
mod soak;
mod support;
