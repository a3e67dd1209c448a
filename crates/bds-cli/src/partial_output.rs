//! Tracks the files that a command created, and removes them if the command does not complete.
//!
//! A partial image passes `check`, so it could be used by mistake. Only files that this run created
//! are removed: never a file or device that existed before, and never another file that has
//! replaced ours at the same path.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// Tracks the files of one new image, and removes them when dropped unless the image was completed.
#[derive(Debug)]
pub(crate) struct PartialOutput {
    /// Paths where no file existed before.
    absent: Vec<PathBuf>,
    created: Vec<CreatedFile>,
    keep: bool,
    /// Why it is kept, if it is.
    why: &'static str,
}

#[derive(Debug)]
struct CreatedFile {
    /// With symlinks resolved: a symlink that was dangling stays as it was.
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl PartialOutput {
    /// Notes which of the files do not exist yet. `keep`: none of them is removed.
    pub(crate) fn before_creation(files: impl IntoIterator<Item = PathBuf>, keep: bool) -> Self {
        let is_absent = |file: &PathBuf| {
            fs::metadata(file).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
        };
        let absent = files.into_iter().filter(is_absent).collect();
        Self { absent, created: Vec::new(), keep, why: "as --keep-partial asks" }
    }

    /// The files stay, because a record tells how to go on with them.
    pub(crate) fn keep_for_record(&mut self) {
        (self.keep, self.why) = (true, "the same command goes on with it");
    }

    /// For an output that this run does not create.
    pub(crate) fn of_existing() -> Self {
        Self::before_creation([], true)
    }

    /// Whether the image stays although it is incomplete.
    pub(crate) fn is_kept(&self) -> bool {
        self.keep || self.created.is_empty()
    }

    /// Notes that the image was created: from here on its files are removed unless
    /// [`complete`](Self::complete) is called.
    pub(crate) fn set_created(&mut self) {
        for file in self.absent.drain(..) {
            // What is not there any more need not be removed.
            let Ok(path) = fs::canonicalize(&file) else { continue };
            let Ok(found) = fs::metadata(&path) else { continue };
            self.created.push(CreatedFile { path, identity: (found.dev(), found.ino()) });
        }
    }

    pub(crate) fn has_created(&self) -> bool {
        !self.created.is_empty()
    }

    /// Keeps the files: the image is complete.
    pub(crate) fn complete(mut self) {
        self.created.clear();
    }

    /// Removes the files unless they are kept, and returns what was done with them, for the error
    /// message.
    pub(crate) fn discard(mut self) -> String {
        if self.created.is_empty() {
            return "it was there before and is kept".to_owned();
        }
        if self.keep {
            self.created.clear();
            return format!("it is kept, {}", self.why);
        }
        let failures = self.remove();
        match failures.first() {
            None => "it was removed (--keep-partial keeps it)".to_owned(),
            Some(why) => format!("it could not be removed ({why})"),
        }
    }

    fn remove(&mut self) -> Vec<io::Error> {
        self.created.drain(..).filter_map(|file| file.remove().err()).collect()
    }
}

impl Drop for PartialOutput {
    fn drop(&mut self) {
        if !self.keep {
            self.remove();
        }
    }
}

impl CreatedFile {
    fn remove(&self) -> io::Result<()> {
        match fs::symlink_metadata(&self.path) {
            Ok(found) if (found.dev(), found.ino()) == self.identity => fs::remove_file(&self.path),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            // Gone, or another file has its name.
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use bds_testkit::Scratch;

    use super::*;

    #[test]
    fn only_what_was_created_is_removed() {
        let scratch = Scratch::new();
        let (old, new) = (scratch.dir().join("old"), scratch.dir().join("new"));
        fs::write(&old, "old").unwrap();
        let mut partial = PartialOutput::before_creation([old.clone(), new.clone()], false);
        fs::write(&old, "emptied").unwrap();
        fs::write(&new, "half").unwrap();
        partial.set_created();
        assert_eq!(partial.discard(), "it was removed (--keep-partial keeps it)");
        assert!(old.exists() && !new.exists());
        let mut partial = PartialOutput::before_creation([old.clone()], false);
        partial.set_created();
        assert_eq!(partial.discard(), "it was there before and is kept");
        assert!(old.exists());
    }

    #[test]
    fn another_file_at_our_path_and_a_symlink_to_ours_stay() {
        let scratch = Scratch::new();
        let (file, link) = (scratch.dir().join("file"), scratch.dir().join("link"));
        std::os::unix::fs::symlink("file", &link).unwrap();
        let mut partial = PartialOutput::before_creation([link.clone()], false);
        fs::write(&link, "half").unwrap();
        partial.set_created();
        drop(partial);
        assert!(!file.exists() && fs::symlink_metadata(&link).is_ok());

        let mut partial = PartialOutput::before_creation([file.clone()], false);
        fs::write(&file, "half").unwrap();
        partial.set_created();
        // Held open, so that its number cannot be given to the next one.
        let _held = fs::File::open(&file).unwrap();
        fs::remove_file(&file).unwrap();
        fs::write(&file, "another").unwrap();
        drop(partial);
        assert_eq!(fs::read(&file).unwrap(), b"another");
    }

    #[test]
    fn complete_images_and_kept_ones_stay() {
        let scratch = Scratch::new();
        for keep in [false, true] {
            let file = scratch.dir().join(format!("file{keep}"));
            let mut partial = PartialOutput::before_creation([file.clone()], keep);
            fs::write(&file, "bytes").unwrap();
            partial.set_created();
            if keep {
                drop(partial)
            } else {
                partial.complete()
            }
            assert!(file.exists());
        }
    }
}
