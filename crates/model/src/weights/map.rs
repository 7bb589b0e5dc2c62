//! Read-only memory maps of weight files.

use crate::error::{Error, Result};
use std::fs::File;
use std::ops::Deref;
use std::path::Path;

/// The bytes of a file.
pub(super) struct Mapping(memmap2::Mmap);

impl Mapping {
    #[allow(unsafe_code)]
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the map is read-only and private. A program that truncates a weight file while it
        // is in use can still end the process with a bus error; that is the price of not copying it,
        // which every loader of these formats pays.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io(path))?;
        Ok(Self(map))
    }
}

impl Deref for Mapping {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}
