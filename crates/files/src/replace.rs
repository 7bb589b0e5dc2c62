//! Putting files and folders at their place in one step.

use crate::mark::{self, Kind};
use crate::temporary::{NewFile, NewFolder, is_temporary, sync_folder};
use crate::{folder_of, unwritable};
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Writes `bytes` to `path`: to a temporary file beside it, flushed to disk, then renamed.
///
/// # Errors
/// Whatever the file system says, with the path in the message; `path` is then as it was.
pub fn write_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = NewFile::create(path)?;
    file.write_all(bytes)?;
    file.finish()
}

/// Makes sure that something can be written at `path`, a file or a folder, by making a temporary
/// file where it would be and removing it. Folders that are missing are not made.
///
/// # Errors
/// Whatever the file system says, with the path in the message.
pub fn try_place(path: &Path) -> io::Result<()> {
    let nearest = path.ancestors().skip(1).map(|folder| match folder.as_os_str().is_empty() {
        true => Path::new("."),
        false => folder,
    });
    let Some(nearest) = nearest.into_iter().find(|folder| folder.exists()) else { return Ok(()) };
    // What is in a folder can be replaced although the folder itself cannot.
    if path.is_dir() && NewFile::create(&path.join("out")).is_ok() {
        return Ok(());
    }
    let name = path.file_name().unwrap_or_default();
    match NewFile::create(&nearest.join(if name.is_empty() { "out".as_ref() } else { name })) {
        Ok(_) => Ok(()),
        Err(error) => {
            let cause = error.to_string();
            let cause = cause.split_once(": ").map_or(cause.as_str(), |(_, cause)| cause);
            let message = format!("cannot write {}: {cause}", path.display());
            Err(io::Error::new(error.kind(), message))
        }
    }
}

/// Refuses what [`replace_folder`] would: a folder that holds more than a result of this kind.
///
/// # Errors
/// Of the kind [`ErrorKind::AlreadyExists`], with what would be lost; whatever the file system says
/// otherwise.
pub fn check_replaceable(path: &Path, kind: &Kind) -> io::Result<()> {
    match mark::loss(path, kind)? {
        None => Ok(()),
        Some(lost) => {
            let message = format!("{} {lost}; it would be lost", path.display());
            Err(io::Error::new(ErrorKind::AlreadyExists, message))
        }
    }
}

/// Fills a fresh folder with `fill` and puts it in place of `path` in one step; a reader finds the
/// old result or the new one. What is there already has to be an older result of the same kind and
/// nothing else.
///
/// A folder that cannot be moved, because a file system is mounted there, the command runs in it or
/// the one above cannot be written, gets the new files one after the other.
///
/// # Errors
/// Whatever `fill` or the file system says, and as [`check_replaceable`]; `path` is then as it was.
pub fn replace_folder<E: From<io::Error>>(
    path: &Path,
    kind: &Kind,
    fill: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<(), E> {
    let named = |error: io::Error| unwritable(&error, path);
    check_replaceable(path, kind)?;
    // A link stays and what it leads to is replaced.
    let target = match fs::canonicalize(path) {
        Ok(real) => real,
        Err(_) if fs::symlink_metadata(path).is_ok() => {
            return Err(
                named(io::Error::new(ErrorKind::AlreadyExists, "it is a broken link")).into()
            );
        }
        Err(_) => path.to_path_buf(),
    };
    let parent = folder_of(&target);
    fs::create_dir_all(parent).map_err(|error| unwritable(&error, parent))?;
    restore(parent, &target);
    let (new, inside) = match NewFolder::create(parent, &target) {
        Ok(new) if !stays(&target) => (new, false),
        Err(error) if !target.is_dir() => return Err(named(error).into()),
        _ => (NewFolder::create(&target, &target).map_err(named)?, true),
    };
    fill(new.path())?;
    mark::write(new.path(), kind).map_err(named)?;
    sync_tree(new.path()).map_err(named)?;
    // Once more, since filling may take hours.
    check_replaceable(path, kind)?;
    if inside {
        return move_into(new.path(), &target, kind).map_err(|error| named(error).into());
    }
    Ok(put_in_place(new, &target, kind).map_err(named)?)
}

/// Removes a folder that is a result of this kind and nothing else.
///
/// # Errors
/// As [`check_replaceable`]; the folder is then as it was.
pub fn remove_folder(path: &Path, kind: &Kind) -> io::Result<()> {
    check_replaceable(path, kind)?;
    let named = |error: io::Error| {
        io::Error::new(error.kind(), format!("cannot remove {}: {error}", path.display()))
    };
    // Under a temporary name first, so that no half of it is taken for a result.
    let aside = NewFolder::create(folder_of(path), path).map_err(named)?;
    fs::rename(path, aside.path()).map_err(named)?;
    aside.remove().map_err(named)
}

/// Makes room for a result of this kind without losing anything: where `path` holds more than an
/// older one, it gets another name, `NAME.kept-N`, which is returned.
///
/// # Errors
/// Whatever the file system says.
pub fn set_aside(path: &Path, kind: &Kind) -> io::Result<Option<PathBuf>> {
    let found = fs::symlink_metadata(path).is_ok();
    if !found || (path.exists() && mark::loss(path, kind)?.is_none()) {
        return Ok(None);
    }
    let kept = unused(path);
    fs::rename(path, &kept).map_err(|error| unwritable(&error, path))?;
    Ok(Some(kept))
}

/// Whether a folder has to stay where it is: the command runs in it, or it is where a file system
/// is mounted.
fn stays(target: &Path) -> bool {
    if !target.is_dir() {
        return false;
    }
    let here = std::env::current_dir().and_then(fs::canonicalize);
    if here.is_ok_and(|here| here.starts_with(target)) {
        return true;
    }
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).ok();
        device(target) != device(folder_of(target))
    }
    #[cfg(not(unix))]
    false
}

fn put_in_place(new: NewFolder, target: &Path, kind: &Kind) -> io::Result<()> {
    let parent = folder_of(target);
    if !target.exists() {
        fs::rename(new.path(), target)?;
        new.keep();
        return sync_folder(parent);
    }
    match exchange(new.path(), target) {
        Ok(()) => {}
        Err(error) if unsupported(&error) => in_two_steps(new.path(), target)?,
        Err(error) => return Err(error),
    }
    sync_folder(parent)?;
    // What was put into the old one in the last moment is kept, under a name that is seen.
    if mark::loss(new.path(), kind)?.is_some() {
        let kept = unused(target);
        fs::rename(new.path(), &kept)?;
        new.keep();
        let message = format!("somebody wrote to it meanwhile; see {}", kept.display());
        return Err(io::Error::new(ErrorKind::AlreadyExists, message));
    }
    Ok(())
}

/// `NAME.kept-N` beside `target`.
fn unused(target: &Path) -> PathBuf {
    let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let at = |number: usize| target.with_file_name(format!("{name}.kept-{number}"));
    (1..).map(at).find(|path| fs::symlink_metadata(path).is_err()).unwrap_or_default()
}

/// Swaps two folders in one step.
fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
    {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        Ok(renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?)
    }
    #[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
    {
        let _ = (one, other);
        Err(ErrorKind::Unsupported.into())
    }
}

/// Whether the file system has no exchange.
fn unsupported(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::InvalidInput)
}

/// How the old folder is called between the two steps.
fn between_steps(target: &Path) -> PathBuf {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    target.with_file_name(format!(".{name}.hydralora.old"))
}

/// The same where the file system has no exchange. A crash between the steps leaves the old folder
/// set aside, and [`restore`] brings it back.
fn in_two_steps(new: &Path, target: &Path) -> io::Result<()> {
    let old = between_steps(target);
    fs::rename(target, &old)?;
    if let Err(error) = fs::rename(new, target) {
        fs::rename(&old, target)?;
        return Err(error);
    }
    fs::rename(&old, new)
}

/// Brings back what a crash in [`in_two_steps`] set aside.
fn restore(parent: &Path, target: &Path) {
    let old = between_steps(target);
    if fs::symlink_metadata(target).is_err() && old.is_dir() && fs::rename(&old, target).is_ok() {
        let _ = sync_folder(parent);
    }
}

/// Moves what `new` holds into `target`, whose own files that are no part of it any more are removed
/// after that.
fn move_into(new: &Path, target: &Path, kind: &Kind) -> io::Result<()> {
    let mut names = Vec::new();
    for entry in fs::read_dir(new)? {
        names.push(entry?.file_name());
    }
    // The list comes last: before it is there, the folder is no result.
    names.sort_by_key(|name| (name == mark::MARK_FILE, name.clone()));
    let older: Vec<_> = fs::read_dir(target)?.collect::<io::Result<_>>()?;
    check_replaceable(target, kind)?;
    for name in &names {
        let (from, to) = (new.join(name), target.join(name));
        if to.is_dir() {
            fs::remove_dir_all(&to)?;
        }
        fs::rename(from, to)?;
    }
    for entry in older {
        let name = entry.file_name();
        if names.contains(&name) || is_temporary(&name, None) || name == crate::LOCK_FILE {
            continue;
        }
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    sync_folder(target)
}

fn sync_tree(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            fs::File::open(&path)?.sync_all()?;
        }
    }
    sync_folder(folder)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Proof;

    const KIND: Kind = Kind {
        name: "test result",
        earlier: Some(Proof { file: "ours.json", fields: &["ours"], files: &["ours.json", "a"] }),
    };
    const OTHER: Kind = Kind { name: "other result", earlier: None };

    fn put(target: &Path, text: &str) -> io::Result<()> {
        replace_folder(target, &KIND, |folder| fs::write(folder.join("a"), text))
    }

    fn read(target: &Path) -> String {
        fs::read_to_string(target.join("a")).unwrap()
    }

    fn count(folder: &Path) -> usize {
        fs::read_dir(folder).unwrap().count()
    }

    #[test]
    fn a_failed_fill_leaves_the_old_folder() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("deep/adapter");
        put(&target, "one").unwrap();
        let failed = replace_folder::<io::Error>(&target, &KIND, |folder| {
            fs::write(folder.join("a"), "two")?;
            Err(io::Error::other("disk full"))
        });
        assert!(failed.is_err());
        assert_eq!(read(&target), "one");
        put(&target, "three").unwrap();
        assert_eq!(read(&target), "three");
        assert_eq!(count(target.parent().unwrap()), 1, "no temporary is left");
    }

    #[test]
    fn a_folder_of_anybody_elses_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("project");
        fs::create_dir_all(target.join("src")).unwrap();
        for file in ["config.json", "a", "src/main.rs"] {
            fs::write(target.join(file), "mine").unwrap();
        }
        let error = put(&target, "ours").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert!(error.to_string().contains("`a`") && error.to_string().contains("lost"), "{error}");
        assert_eq!(read(&target), "mine");
        assert!(target.join("src/main.rs").exists());
    }

    #[test]
    fn one_file_more_or_one_that_was_changed_is_named_and_kept() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        put(&target, "one").unwrap();
        fs::create_dir(target.join("notes")).unwrap();
        fs::write(target.join("notes/thesis.tex"), "mine").unwrap();
        let error = put(&target, "two").unwrap_err().to_string();
        assert!(error.contains("notes/thesis.tex"), "{error}");
        let error = remove_folder(&target, &KIND).unwrap_err().to_string();
        assert!(error.contains("notes/thesis.tex"), "{error}");
        fs::remove_dir_all(target.join("notes")).unwrap();
        fs::write(target.join("a"), "1ne").unwrap();
        let error = put(&target, "two").unwrap_err().to_string();
        assert!(error.contains("`a`, which was changed"), "{error}");
        assert_eq!(read(&target), "1ne");
        fs::write(target.join("a"), "one").unwrap();
        put(&target, "two").unwrap();
        let other = replace_folder::<io::Error>(&target, &OTHER, |_| Ok(())).unwrap_err();
        assert!(other.to_string().contains("holds a test result"), "{other}");
        remove_folder(&target, &KIND).unwrap();
        assert_eq!(count(root.path()), 0);
    }

    #[test]
    fn results_of_earlier_builds_are_known_by_what_only_they_hold() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        fs::create_dir(&target).unwrap();
        fs::write(target.join("a"), "old").unwrap();
        assert!(put(&target, "new").is_err(), "a name alone is no proof");
        fs::write(target.join("ours.json"), "{\"ours\": 1}").unwrap();
        fs::write(target.join("README.md"), "mine").unwrap();
        assert!(put(&target, "new").unwrap_err().to_string().contains("README.md"));
        fs::remove_file(target.join("README.md")).unwrap();
        put(&target, "new").unwrap();
        assert_eq!(read(&target), "new");
    }

    #[test]
    fn what_is_written_to_the_old_one_in_the_last_moment_is_kept() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        put(&target, "one").unwrap();
        let failed = replace_folder::<io::Error>(&target, &KIND, |folder| {
            fs::write(target.join("late.txt"), "mine")?;
            fs::write(folder.join("a"), "two")
        });
        assert!(failed.unwrap_err().to_string().contains("late.txt"));
        assert_eq!(read(&target), "one");
        fs::remove_file(target.join("late.txt")).unwrap();
        // After the last look.
        let new = NewFolder::create(root.path(), &target).unwrap();
        mark::write(new.path(), &KIND).unwrap();
        fs::write(target.join("late.txt"), "mine").unwrap();
        let error = put_in_place(new, &target, &KIND).unwrap_err().to_string();
        assert!(error.contains("out.kept-1"), "{error}");
        assert_eq!(fs::read_to_string(root.path().join("out.kept-1/late.txt")).unwrap(), "mine");
    }

    #[test]
    fn room_is_made_by_another_name() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("best");
        assert_eq!(set_aside(&target, &KIND).unwrap(), None);
        put(&target, "one").unwrap();
        assert_eq!(set_aside(&target, &KIND).unwrap(), None);
        for number in 1..3 {
            fs::write(target.join("notes.txt"), "mine").unwrap();
            let kept = set_aside(&target, &KIND).unwrap().unwrap();
            assert_eq!(kept, root.path().join(format!("best.kept-{number}")));
            assert_eq!(fs::read_to_string(kept.join("notes.txt")).unwrap(), "mine");
            put(&target, "two").unwrap();
        }
    }

    #[test]
    fn without_an_exchange_a_crash_between_the_steps_is_mended() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        put(&target, "one").unwrap();
        let new = root.path().join("new");
        fs::create_dir(&new).unwrap();
        fs::write(new.join("a"), "two").unwrap();
        in_two_steps(&new, &target).unwrap();
        assert_eq!((read(&target).as_str(), read(&new).as_str()), ("two", "one"));
        fs::remove_dir_all(&target).unwrap();
        fs::rename(&new, between_steps(&target)).unwrap();
        restore(root.path(), &target);
        assert_eq!(read(&target), "one");
    }

    #[cfg(unix)]
    #[test]
    fn links_stay_and_folders_that_cannot_be_moved_are_filled() {
        let root = tempfile::tempdir().unwrap();
        let (real, link) = (root.path().join("real"), root.path().join("link"));
        put(&real, "one").unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        put(&link, "two").unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(read(&real), "two");
        // As for a folder in which the command runs.
        let new = NewFolder::create(&real, &real).unwrap();
        fs::create_dir(new.path().join("sub")).unwrap();
        fs::write(new.path().join("sub/b"), "three").unwrap();
        mark::write(new.path(), &KIND).unwrap();
        move_into(new.path(), &real, &KIND).unwrap();
        drop(new);
        assert!(real.join("sub/b").exists() && !real.join("a").exists());
        assert_eq!(count(&real), 2, "the new folder and the list");
        assert!(mark::loss(&real, &KIND).unwrap().is_none());
    }

    #[cfg(unix)]
    #[test]
    fn names_that_can_be_guessed_are_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let secret = root.path().join("secret");
        fs::write(&secret, "kept").unwrap();
        let guess = format!(".recipe.yaml.{}.tmp", std::process::id());
        std::os::unix::fs::symlink(&secret, root.path().join(guess)).unwrap();
        write_file(&root.path().join("recipe.yaml"), b"recipe").unwrap();
        assert_eq!(fs::read_to_string(&secret).unwrap(), "kept");
    }

    #[test]
    fn places_are_tried_and_the_path_is_named() {
        let root = tempfile::tempdir().unwrap();
        try_place(&root.path().join("not/there/yet.json")).unwrap();
        try_place(root.path()).unwrap();
        assert_eq!(count(root.path()), 0);
        fs::write(root.path().join("file"), "").unwrap();
        let below = root.path().join("file/out.json");
        let error = try_place(&below).unwrap_err();
        assert!(error.to_string().contains(&below.display().to_string()), "{error}");
        let error = write_file(Path::new("/nonexistent-folder/x"), b"").unwrap_err();
        assert!(error.to_string().contains("/nonexistent-folder/x"), "{error}");
    }
}
