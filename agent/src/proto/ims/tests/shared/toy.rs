//! A store in memory that servers share.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use crate::proto::ims::{Hoa, MappingStore, Record, Swapped, Write};

type Watcher = Box<dyn FnMut(Hoa, Record) + Send>;

/// What both servers share: records, and the watcher of each server.
#[derive(Default)]
pub(super) struct Shelf {
    pub(super) records: BTreeMap<Hoa, Record>,
    watchers: BTreeMap<usize, Watcher>,
}

/// A server's end of the store.
pub(super) struct ToyStore {
    pub(super) shelf: Arc<Mutex<Shelf>>,
    pub(super) server: usize,
}

impl MappingStore for ToyStore {
    type Error = Infallible;

    fn load(&self, mut each: impl FnMut(Hoa, Record)) -> Result<(), Infallible> {
        let shelf = self.shelf.lock().unwrap();
        for (hoa, record) in &shelf.records {
            each(*hoa, record.clone());
        }
        Ok(())
    }

    fn swap(&self, writes: &[Write]) -> Result<Vec<Swapped>, Infallible> {
        let mut shelf = self.shelf.lock().unwrap();
        let outcomes = writes.iter().map(|write| {
            let stored = shelf.records.get(&write.hoa).cloned();
            if stored.as_ref().map(Record::version) != write.expected {
                return Swapped::Lost(stored);
            }
            shelf.records.insert(write.hoa, write.record.clone());
            for (server, watcher) in &mut shelf.watchers {
                if *server != self.server {
                    watcher(write.hoa, write.record.clone());
                }
            }
            Swapped::Stored
        });
        Ok(outcomes.collect())
    }

    fn watch(&self, changed: impl FnMut(Hoa, Record) + Send + 'static) -> Result<(), Infallible> {
        let mut shelf = self.shelf.lock().unwrap();
        shelf.watchers.insert(self.server, Box::new(changed));
        Ok(())
    }
}
