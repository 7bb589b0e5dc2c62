//! Behaviour of whole base models.

mod stories;
