//! The store of mappings of one server: one file (redb), which nobody else can open meanwhile. A
//! transaction counts as done only when it is on the disk.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use redb::backends::FileBackend;
use redb::{
    Builder, Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition, TableError,
};

use crate::proto::ims::{Hoa, MappingStore, Record, RecordError, Swapped, Write};

/// Home address to [`Record`].
const NODES: TableDefinition<'_, Hoa, &[u8]> = TableDefinition::new("nodes");
/// Cache size. Only the start and operators read the store, and they read all of it.
const CACHE_BYTES: usize = 32 * 1024 * 1024;

/// Why the store is unusable.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has the store open.
    #[error("{} is in use by another process; is another mapping server running?", path.display())]
    InUse {
        /// Path of the file.
        path: PathBuf,
    },
    /// Creating or opening the file failed.
    #[error("Cannot open the store {}", path.display())]
    Open {
        /// Path of the file.
        path: PathBuf,
        /// Error of the system call.
        source: io::Error,
    },
    /// Reading or writing the store failed.
    #[error("Cannot use the store {}", path.display())]
    Use {
        /// Path of the file.
        path: PathBuf,
        /// Error of redb.
        source: Box<redb::Error>,
    },
    /// A record does not decode.
    #[error("Cannot read the store {}", path.display())]
    Record {
        /// Path of the file.
        path: PathBuf,
        /// Error of the decoder.
        source: RecordError,
    },
}

/// The store. After an error it opens the file again, because redb does not continue.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    database: Mutex<Option<Arc<Database>>>,
}

impl Store {
    /// Opens the file. Creates it with mode 0600, and its directory, if missing.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Ok(Self {
            path: path.to_owned(),
            database: Mutex::new(Some(Arc::new(open(path)?))),
        })
    }

    /// Returns the record of a home address.
    ///
    /// # Errors
    ///
    /// [`StoreError`].
    pub fn get(&self, hoa: Hoa) -> Result<Option<Record>, StoreError> {
        let database = self.database()?;
        let bytes = get(&database, hoa).map_err(|source| self.failed(source))?;
        let record = bytes.map(|bytes| Record::decode(&bytes)).transpose();
        record.map_err(|source| self.not_understood(source))
    }

    fn slot(&self) -> std::sync::MutexGuard<'_, Option<Arc<Database>>> {
        // The guarded value is consistent at any moment, so a poisoned lock is usable.
        self.database.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn database(&self) -> Result<Arc<Database>, StoreError> {
        let mut slot = self.slot();
        if let Some(database) = &*slot {
            return Ok(Arc::clone(database));
        }
        let database = Arc::new(open(&self.path)?);
        *slot = Some(Arc::clone(&database));
        Ok(database)
    }

    fn failed(&self, source: redb::Error) -> StoreError {
        StoreError::Use {
            path: self.path.clone(),
            source: Box::new(source),
        }
    }

    fn not_understood(&self, source: RecordError) -> StoreError {
        StoreError::Record {
            path: self.path.clone(),
            source,
        }
    }
}

impl MappingStore for Store {
    type Error = StoreError;

    fn load(&self, each: impl FnMut(Hoa, Record)) -> Result<(), StoreError> {
        let database = self.database()?;
        read(&database, each)
            .map_err(|source| self.failed(source))?
            .map_err(|source| self.not_understood(source))
    }

    /// Writes all records in one transaction.
    fn swap(&self, writes: &[Write]) -> Result<Vec<Swapped>, StoreError> {
        let database = self.database()?;
        swap(&database, writes)
            .map_err(|source| {
                drop(database);
                self.slot().take();
                self.failed(source)
            })?
            .map_err(|source| self.not_understood(source))
    }

    /// Nobody else writes to the file, so no change is ever told.
    fn watch(&self, _: impl FnMut(Hoa, Record) + Send + 'static) -> Result<(), StoreError> {
        Ok(())
    }
}

fn open(path: &Path) -> Result<Database, StoreError> {
    let refused = |source| StoreError::Open {
        path: path.to_owned(),
        source,
    };
    if let Some(directory) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(refused)?;
    }
    let file = open_file(path).map_err(refused)?;
    let database = FileBackend::new(file)
        .and_then(|backend| {
            Builder::new()
                .set_cache_size(CACHE_BYTES)
                .create_with_backend(backend)
        })
        .map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => StoreError::InUse {
                path: path.to_owned(),
            },
            error => StoreError::Use {
                path: path.to_owned(),
                source: Box::new(error.into()),
            },
        })?;
    Ok(database)
}

/// Opens or creates the file for the owner of the directory. An operator enrolls nodes as root
/// while no server runs; the server itself need not be root.
fn open_file(path: &Path) -> io::Result<File> {
    let directory = path.parent().filter(|it| !it.as_os_str().is_empty());
    let directory = directory.unwrap_or(Path::new("."));
    let owner = std::fs::metadata(directory)?;
    let is_ours = owner.uid() == nix::unistd::geteuid().as_raw();
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    match options.clone().create_new(true).open(path) {
        Ok(file) if is_ours => Ok(file),
        Ok(file) => {
            fchown(&file, Some(owner.uid()), Some(owner.gid()))?;
            Ok(file)
        }
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        Err(_) if is_ours => options.open(path),
        // No symbolic link: nobody else may choose the file that root writes to.
        Err(_) => options.custom_flags(libc::O_NOFOLLOW).open(path),
    }
}

fn swap(
    database: &Database,
    writes: &[Write],
) -> Result<Result<Vec<Swapped>, RecordError>, redb::Error> {
    let transaction = database.begin_write()?;
    let mut outcomes = Vec::with_capacity(writes.len());
    {
        let mut nodes = transaction.open_table(NODES)?;
        for write in writes {
            let stored = nodes
                .get(write.hoa)?
                .map(|bytes| Record::decode(bytes.value()));
            let stored = match stored.transpose() {
                Ok(stored) => stored,
                Err(error) => return Ok(Err(error)),
            };
            if stored.as_ref().map(Record::version) == write.expected {
                nodes.insert(write.hoa, write.record.encode().as_slice())?;
                outcomes.push(Swapped::Stored);
            } else {
                outcomes.push(Swapped::Lost(stored));
            }
        }
    }
    // Durable: `commit` returns when the data is on the disk.
    transaction.commit()?;
    Ok(Ok(outcomes))
}

fn get(database: &Database, hoa: Hoa) -> Result<Option<Vec<u8>>, redb::Error> {
    let transaction = database.begin_read()?;
    match transaction.open_table(NODES) {
        Ok(nodes) => Ok(nodes.get(hoa)?.map(|bytes| bytes.value().to_vec())),
        Err(TableError::TableDoesNotExist(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn read(
    database: &Database,
    mut each: impl FnMut(Hoa, Record),
) -> Result<Result<(), RecordError>, redb::Error> {
    let transaction = database.begin_read()?;
    let nodes = match transaction.open_table(NODES) {
        Ok(nodes) => nodes,
        Err(TableError::TableDoesNotExist(_)) => return Ok(Ok(())),
        Err(error) => return Err(error.into()),
    };
    for entry in nodes.iter()? {
        let (hoa, bytes) = entry?;
        match Record::decode(bytes.value()) {
            Ok(record) => each(hoa.value(), record),
            Err(error) => return Ok(Err(error)),
        }
    }
    Ok(Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn record(sequence: u64) -> Record {
        Record {
            generation: 1,
            sequence,
            lifetime_s: 60,
            until_ms: 1,
            moas: Vec::new(),
            freed: Vec::new(),
        }
    }

    fn write(number: u8, expected: Option<u64>, sequence: u64) -> Write {
        Write {
            hoa: [number; 16],
            expected: expected.map(|sequence| record(sequence).version()),
            record: record(sequence),
        }
    }

    #[test]
    fn what_is_written_is_there_after_the_store_is_opened_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state/ims.redb");
        let store = Store::open(&path).unwrap();
        let mut count = 0;
        store.load(|_, _| count += 1).unwrap();
        assert_eq!(count, 0);
        let writes = [write(0, None, 7), write(1, None, 7), write(2, None, 7)];
        assert_eq!(store.swap(&writes).unwrap(), vec![Swapped::Stored; 3]);
        let outcome = store.swap(&[write(0, Some(7), 8)]).unwrap();
        assert_eq!(outcome, [Swapped::Stored]);
        drop(store);
        let store = Store::open(&path).unwrap();
        let mut found = Vec::new();
        store
            .load(|hoa, record| found.push((hoa[0], record.sequence)))
            .unwrap();
        assert_eq!(found, [(0, 8), (1, 7), (2, 7)]);
        assert_eq!(store.get([2; 16]).unwrap(), Some(record(7)));
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
    }

    #[test]
    fn write_that_expects_another_version_loses_and_the_others_of_its_batch_do_not() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("ims.redb")).unwrap();
        store.swap(&[write(0, None, 7)]).unwrap();
        let batch = [
            write(0, None, 9),
            write(1, None, 1),
            write(0, Some(6), 9),
            write(2, Some(1), 2),
            write(0, Some(7), 8),
        ];
        let lost = || Swapped::Lost(Some(record(7)));
        assert_eq!(
            store.swap(&batch).unwrap(),
            [
                lost(),
                Swapped::Stored,
                lost(),
                Swapped::Lost(None),
                Swapped::Stored
            ]
        );
        assert_eq!(store.get([0; 16]).unwrap(), Some(record(8)));
        assert_eq!(store.get([2; 16]).unwrap(), None);
    }

    #[test]
    fn what_root_makes_belongs_to_the_owner_of_the_directory() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let (uid, gid) = (64_001, 64_002);
        std::os::unix::fs::chown(directory.path(), Some(uid), Some(gid)).unwrap();
        let path = directory.path().join("ims.redb");
        drop(Store::open(&path).unwrap());
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (uid, gid));
        drop(Store::open(&path).unwrap());
        let link = directory.path().join("link.redb");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let error = Store::open(&link).unwrap_err();
        assert!(matches!(error, StoreError::Open { .. }), "{error}");
    }

    #[test]
    fn second_user_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ims.redb");
        let _store = Store::open(&path).unwrap();
        let error = Store::open(&path).unwrap_err();
        assert!(matches!(error, StoreError::InUse { .. }), "{error}");
    }

    #[test]
    fn file_that_is_no_store_is_refused_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ims.redb");
        std::fs::write(&path, "something else".repeat(1000)).unwrap();
        let error = Store::open(&path).unwrap_err();
        assert!(matches!(error, StoreError::Use { .. }), "{error}");
        assert!(std::fs::read_to_string(&path).unwrap().starts_with("some"));
    }
}
