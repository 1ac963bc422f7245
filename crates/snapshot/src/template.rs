//! Templates: stores of VMs that were booted once, with the engine ready and nothing in it.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use dormouse_vm::{SnapshotKey, allocated_bytes, copy_sparse};
use rustix::fs::{FlockOperation, flock};

use crate::progress::Progress;
use crate::seal::{DISK, MEMORY, Origin, STATE, Seal, SealError, Unfit, discard};

/// What a template that isn't finished is called, before its random part.
const UNFINISHED: &str = "new-";

/// A folder of templates, each named by the hash of its key.
#[derive(Debug, Clone)]
pub struct TemplateStore {
    folder: PathBuf,
}

/// One template. As long as this is held it isn't removed.
#[derive(Debug)]
pub struct Template {
    folder: PathBuf,
    seal: Seal,
    _in_use: File,
}

/// Why templates can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The system refused something.
    #[error("can't {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The copy wasn't sealed.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// It doesn't fit, or is damaged.
    #[error(transparent)]
    Unfit(#[from] Unfit),
    /// Somebody copies it.
    #[error("the template {0} is in use")]
    InUse(String),
    /// A copy wouldn't leave enough of the disk free.
    #[error("the session's storage has {} MiB free, a copy needs {}", free >> 20, least >> 20)]
    NoSpace {
        /// What is free, in bytes.
        free: u64,
        /// What would have to be.
        least: u64,
    },
    /// There is no such template.
    #[error("there is no template {0}")]
    Missing(String),
}

fn cannot(what: &'static str) -> impl FnOnce(io::Error) -> TemplateError {
    move |source| TemplateError::Io { what, source }
}

impl TemplateStore {
    /// The templates in this folder, which needn't be there yet.
    #[must_use]
    pub const fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// The template with this key, if there is one.
    ///
    /// # Errors
    /// See [`TemplateError`]. One that is [unfit](TemplateError::Unfit) is removed.
    pub fn find(&self, key: &SnapshotKey) -> Result<Option<Template>, TemplateError> {
        let Some(mut template) = self.open(&key.digest())? else { return Ok(None) };
        match template.seal.check(&template.folder, key) {
            Ok(()) => {
                if template.seal.is_of_an_earlier_host() {
                    template.seal.renew(&template.folder)?;
                }
                Ok(Some(template))
            }
            Err(unfit) => {
                drop(template);
                tracing::warn!(%unfit, "a template can't be used and is removed");
                self.remove(&key.digest())?;
                Err(unfit.into())
            }
        }
    }

    fn open(&self, name: &str) -> Result<Option<Template>, TemplateError> {
        let folder = self.folder.join(name);
        let in_use = match File::open(&folder) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(cannot("open a template")(error)),
        };
        flock(&in_use, FlockOperation::LockShared)
            .map_err(|error| cannot("lock a template")(error.into()))?;
        match Seal::read(&folder) {
            // Removed while we waited for the lock, or by somebody without manners.
            Ok(None) => Ok(None),
            Ok(Some(seal)) => Ok(Some(Template { folder, seal, _in_use: in_use })),
            Err(Unfit::Seal) => {
                drop(in_use);
                self.remove(name)?;
                Err(Unfit::Seal.into())
            }
            Err(unfit) => Err(unfit.into()),
        }
    }

    /// A folder in which a template can be made.
    ///
    /// # Errors
    /// See [`TemplateError`].
    pub fn begin(&self) -> Result<tempfile::TempDir, TemplateError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.folder)
            .map_err(cannot("make the folder of templates"))?;
        tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempdir_in(&self.folder)
            .map_err(cannot("make a folder for a template"))
    }

    /// Puts a template that was made and sealed into its place. One that is already there stays.
    ///
    /// # Errors
    /// See [`TemplateError`]; the new one is removed then.
    pub fn publish(&self, made: tempfile::TempDir) -> Result<Template, TemplateError> {
        let seal = Seal::read(made.path())?.ok_or(Unfit::Memory("it isn't sealed"))?;
        let name = seal.key.digest();
        // Its files must be whole after a crash of the host, as their seal says that they are.
        for file in [DISK, MEMORY, STATE] {
            File::open(made.path().join(file))
                .and_then(|file| file.sync_all())
                .map_err(cannot("write a template out"))?;
        }
        match fs::rename(made.path(), self.folder.join(&name)) {
            Ok(()) => drop(made.keep()),
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            Err(error) => return Err(cannot("publish a template")(error)),
        }
        self.open(&name)?.ok_or(TemplateError::Missing(name))
    }

    /// All templates.
    ///
    /// # Errors
    /// See [`TemplateError`].
    pub fn all(&self) -> Result<Vec<Template>, TemplateError> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(cannot("read the folder of templates")(error)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let name = entry.map_err(cannot("read the folder of templates"))?.file_name();
            if let Some(name) = name.to_str().filter(|name| !name.starts_with(UNFINISHED)) {
                match self.open(name) {
                    Err(TemplateError::Unfit(unfit)) => {
                        tracing::warn!(%unfit, "a template can't be used");
                    }
                    opened => found.extend(opened?),
                }
            }
        }
        Ok(found)
    }

    /// Removes a template that nobody copies just now.
    ///
    /// # Errors
    /// See [`TemplateError`].
    pub fn remove(&self, name: &str) -> Result<(), TemplateError> {
        let folder = self.folder.join(name);
        let lock = match File::open(&folder) {
            Ok(lock) if !name.contains('/') && !name.starts_with('.') => lock,
            _ => return Err(TemplateError::Missing(name.to_owned())),
        };
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| TemplateError::InUse(name.to_owned()))?;
        // The seal goes first: a removal that is cut short leaves no template.
        discard(&folder).map_err(cannot("remove a template"))?;
        fs::remove_dir_all(&folder).map_err(cannot("remove a template"))
    }

    /// Removes what makers of templates left that were killed. Only for who knows that nobody makes one.
    pub fn sweep(&self) {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        for entry in
            entries.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(UNFINISHED.as_bytes()))
        {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

impl Template {
    /// Its name: the hash of its key.
    #[must_use]
    pub fn name(&self) -> String {
        self.seal.key.digest()
    }

    /// Its seal.
    #[must_use]
    pub const fn seal(&self) -> &Seal {
        &self.seal
    }

    /// What it takes on the disk, in bytes.
    #[must_use]
    pub fn allocated_bytes(&self) -> u64 {
        [DISK, MEMORY, STATE].iter().filter_map(|name| allocated_bytes(&self.folder.join(name)).ok()).sum()
    }

    /// How large its data disk is, in bytes.
    ///
    /// # Errors
    /// See [`TemplateError`].
    pub fn disk_bytes(&self) -> Result<u64, TemplateError> {
        fs::metadata(self.folder.join(DISK))
            .map(|found| found.len())
            .map_err(cannot("look at a template's disk"))
    }

    /// Copies it into a store, which is sealed then. What the store held is replaced. Blocks; for use off the async
    /// threads.
    ///
    /// # Errors
    /// See [`TemplateError`]. The store has no memory then, and a disk that is blank or the template's.
    pub fn copy_to(&self, store: &Path, progress: &Progress) -> Result<Seal, TemplateError> {
        debug_assert_eq!(self.seal.origin, Origin::Template);
        discard(store).map_err(cannot("clear a store"))?;
        let beside = store.join(format!("{DISK}.new"));
        let _ = fs::remove_file(&beside);
        progress.begin("copying the template", self.allocated_bytes());
        let copied = &progress.done;
        copy_sparse(&self.folder.join(DISK), &beside, copied).map_err(cannot("copy a template's disk"))?;
        fs::rename(beside, store.join(DISK)).map_err(cannot("copy a template's disk"))?;
        for name in [MEMORY, STATE] {
            copy_sparse(&self.folder.join(name), &store.join(name), copied)
                .map_err(cannot("copy a template"))?;
        }
        Ok(self.seal.make_for_copy(store)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::tests::{key, store};

    fn made(templates: &TemplateStore) -> Template {
        let made = templates.begin().unwrap();
        store(made.path());
        Seal::make(made.path(), Origin::Template, key(), "boot".into(), None).unwrap();
        templates.publish(made).unwrap()
    }

    #[test]
    fn a_template_is_published_found_copied_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let templates = TemplateStore::new(folder.path().join("templates"));
        assert!(templates.find(&key()).unwrap().is_none());
        assert!(templates.all().unwrap().is_empty());
        let name = made(&templates).name();
        let template = templates.find(&key()).unwrap().unwrap();
        assert!(templates.find(&SnapshotKey { cpus: 3, ..key() }).unwrap().is_none());

        let copy = tempfile::tempdir().unwrap();
        template.copy_to(copy.path(), &Progress::default()).unwrap();
        let seal = Seal::read(copy.path()).unwrap().unwrap();
        seal.check(copy.path(), &key()).unwrap();
        assert_eq!(seal.origin, Origin::Template);

        assert!(matches!(templates.remove(&name), Err(TemplateError::InUse(_))));
        drop(template);
        templates.remove(&name).unwrap();
        assert!(templates.find(&key()).unwrap().is_none());
        seal.check(copy.path(), &key()).unwrap();
    }

    #[test]
    fn the_first_of_two_equal_templates_stays_and_nothing_unfinished_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let templates = TemplateStore::new(folder.path().to_owned());
        drop(made(&templates));
        drop(made(&templates));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        std::mem::forget(templates.begin().unwrap());
        assert_eq!(templates.all().unwrap().len(), 1);
        templates.sweep();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_template_outlives_a_restart_of_the_host_and_is_read_whole_once_after_it() {
        let folder = tempfile::tempdir().unwrap();
        let templates = TemplateStore::new(folder.path().to_owned());
        let made = templates.begin().unwrap();
        store(made.path());
        let seal = Seal::make(made.path(), Origin::Template, key(), "boot".into(), None).unwrap();
        seal.make_sum(made.path()).unwrap();
        seal.of_an_earlier_host().written(made.path());
        drop(templates.publish(made).unwrap());
        let template = templates.find(&key()).unwrap().expect("its checksum is there, and right");
        assert!(!template.seal.is_of_an_earlier_host());
        let path = template.folder.clone();
        drop(template);
        // Were it read again, this would be found.
        let memory = File::options().write(true).open(path.join(MEMORY)).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&memory, b"n", 0).unwrap();
        assert!(templates.find(&key()).unwrap().is_some());
        Seal::read(&path).unwrap().unwrap().of_an_earlier_host().written(&path);
        assert!(matches!(templates.find(&key()), Err(TemplateError::Unfit(Unfit::Memory(_)))));
        assert!(templates.find(&key()).unwrap().is_none(), "a template that was damaged is removed");
    }

    #[test]
    fn a_damaged_template_is_refused_once_and_then_there_is_none() {
        let folder = tempfile::tempdir().unwrap();
        let templates = TemplateStore::new(folder.path().to_owned());
        let path = folder.path().join(made(&templates).name());
        fs::write(path.join(STATE), "other").unwrap();
        assert!(matches!(templates.find(&key()), Err(TemplateError::Unfit(Unfit::State))));
        assert!(!path.exists() && templates.find(&key()).unwrap().is_none());
    }
}
