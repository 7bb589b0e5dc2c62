//! Files that are not there: Git LFS leaves a few lines in the place of what was not downloaded.

/// What such a file begins with.
const START: &[u8] = b"version https://git-lfs.github.com/spec/";

/// What a file is that begins with these bytes, where it stands for another that was not downloaded.
pub fn lfs_pointer(bytes: &[u8]) -> Option<&'static str> {
    bytes.starts_with(START).then_some(
        "a Git LFS pointer, a note in the place of a file that was not downloaded; fetch it with `git lfs \
         pull`",
    )
}
