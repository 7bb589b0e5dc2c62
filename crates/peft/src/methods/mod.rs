//! The fine-tuning methods: one file each, listed once below.

use crate::described::Registered;
use crate::error::{Error, Result};
use crate::method::Method;

macro_rules! methods {
    ($($method:ident),* $(,)?) => {
        $(mod $method;)*
        /// Every method there is.
        pub static METHODS: &[&dyn Method] = &[$(&Registered::<$method::Options>::ENTRY),*];
    };
}

methods! {
    full, lora, lora_split, hydralora, loramoe, mtl_lora, domain_heads, alora, align_lora, flylora,
    block_hydra, adalora, ia3, prompt_tuning, p_tuning, prefix_tuning,
}

/// The method of that name.
///
/// # Errors
/// If there is none; the message lists all.
pub fn find(name: &str) -> Result<&'static dyn Method> {
    METHODS.iter().copied().find(|method| method.name() == name).ok_or_else(|| {
        let known: Vec<&str> = METHODS.iter().map(|method| method.name()).collect();
        Error::UnknownMethod { name: name.to_owned(), known: known.join(", ") }
    })
}
