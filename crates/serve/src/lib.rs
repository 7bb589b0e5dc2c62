//! The HTTP server: the protocol of OpenAI's clients over a base model and adapters on it, by name.
//!
//! One thread owns the engine and answers all requests together; the threads of a small runtime read
//! requests and write answers. What lies between are channels, one to the engine and one back for
//! every request; a caller that leaves drops its end, and the engine forgets the request.
//!
//! | step | module |
//! | --- | --- |
//! | connections, time limits, the end | `server` |
//! | keys, addresses, limits of all requests | `app` |
//! | a body as what is expected there | `body`, `types` |
//! | what is asked at each address | `api` |
//! | a request's prompt, its forms and limits | `ask`, `forms`, `loaded` |
//! | the engine's thread | `worker` |
//! | what the model writes, taken apart | `answer`, `calls`, `choice` |
//! | adapters that come and go | `adapters` |

#![forbid(unsafe_code)]

mod adapters;
mod answer;
mod api;
mod app;
mod ask;
mod body;
mod calls;
mod choice;
mod error;
mod forms;
mod loaded;
mod metrics;
mod pieces;
mod server;
mod stream;
mod types;
mod worker;

pub use adapters::{AdapterLimits, OpenAdapter, OpenedAdapter};
pub use app::{ApiKey, Log, Options};
pub use server::{Model, Server};
