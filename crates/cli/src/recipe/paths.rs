//! Where a recipe's relative paths start. What is read (data, templates, the model) counts from the
//! folder of the recipe, and what an argument says from the working directory. What is only there under
//! the other of the two is taken from there, with a note. What is written counts from the working
//! directory.

use std::path::{Component, Path, PathBuf};

/// The two places that a path may start from.
pub(super) struct Origins<'a> {
    /// The recipe's folder.
    pub(super) base: &'a Path,
    /// Whether an argument set this field.
    pub(super) set: &'a dyn Fn(&str) -> bool,
    /// What is to be told.
    pub(super) notes: Vec<String>,
}

impl Origins<'_> {
    /// Where the file or folder is that `field` names; none where it is neither here nor there.
    pub(super) fn find(&mut self, field: &str, path: &Path) -> Option<PathBuf> {
        if path.as_os_str().is_empty() {
            return None;
        }
        let of_recipe = self.base.join(path);
        let same = path.is_absolute() || self.base.as_os_str().is_empty();
        if same || std::path::absolute(&of_recipe).ok() == std::path::absolute(path).ok() {
            return of_recipe.exists().then_some(of_recipe);
        }
        let from_here = std::path::absolute(path).ok().filter(|path| path.exists());
        let of_recipe = Some(of_recipe).filter(|path| path.exists());
        if (self.set)(field) {
            return from_here.or(of_recipe);
        }
        if of_recipe.is_none() && from_here.is_some() {
            let written = relative(path, self.base).unwrap_or_else(|| path.to_path_buf());
            self.notes.push(format!(
                "note: {field}: there is no {} in the recipe's folder, from which paths count; taken from the \
                 working directory ({} would name it)",
                path.display(),
                written.display()
            ));
        }
        of_recipe.or(from_here)
    }
}

/// The path by which `target` is reached from `folder`, both as they are from the working directory.
/// `None` where links would make it another place.
pub(crate) fn relative(target: &Path, folder: &Path) -> Option<PathBuf> {
    let here = |path: &Path| {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        path.canonicalize().ok()
    };
    let (target, folder) = (here(target)?, here(folder)?);
    let mut ahead = target.components().peekable();
    let mut behind = folder.components().peekable();
    if ahead.peek() != behind.peek() {
        return None;
    }
    while ahead.peek().is_some() && ahead.peek() == behind.peek() {
        ahead.next();
        behind.next();
    }
    let up = behind.map(|_| Component::ParentDir);
    let path: PathBuf = up.chain(ahead).collect();
    Some(if path.as_os_str().is_empty() { PathBuf::from(".") } else { path })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn paths_are_written_from_another_folder() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        fs::create_dir_all(at("a/b")).unwrap();
        fs::create_dir_all(at("c")).unwrap();
        fs::write(at("c/x.jsonl"), "").unwrap();
        let from = |target: &str, folder: &str| relative(&at(target), &at(folder));
        assert_eq!(from("c/x.jsonl", "a/b"), Some("../../c/x.jsonl".into()));
        assert_eq!(from("c/x.jsonl", "c"), Some("x.jsonl".into()));
        assert_eq!(from("a/b", "a/b"), Some(".".into()));
        assert_eq!(from("c/none", "a/b"), None);
    }

    #[test]
    fn what_is_only_elsewhere_is_taken_with_a_note() {
        let place = tempfile::tempdir().unwrap();
        fs::write(place.path().join("own.jsonl"), "").unwrap();
        let set = |field: &str| field == "model.path";
        let mut origins = Origins { base: place.path(), set: &set, notes: Vec::new() };
        let found = origins.find("data.train[0].path", Path::new("own.jsonl"));
        assert_eq!(found, Some(place.path().join("own.jsonl")));
        assert_eq!(origins.find("data.train[0].path", Path::new("none.jsonl")), None);
        assert!(origins.notes.is_empty());
        // Tests run in the crate's folder.
        let here = std::path::absolute("Cargo.toml").unwrap();
        assert_eq!(origins.find("model.path", Path::new("Cargo.toml")), Some(here.clone()));
        assert!(origins.notes.is_empty(), "an argument counts from here");
        assert_eq!(origins.find("data.train[0].path", Path::new("Cargo.toml")), Some(here));
        assert!(origins.notes[0].contains("working directory"), "{:?}", origins.notes);
    }
}
