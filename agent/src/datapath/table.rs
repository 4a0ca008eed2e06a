//! A typed hash map of the eBPF programs.

use std::io;
use std::marker::PhantomData;
use std::mem::size_of;
use std::os::fd::AsFd;

use aya::Pod;
use aya::maps::{Map, MapData};

use super::DatapathError;
use super::sys;

/// One hash map. All operations take `&self`, because the kernel serializes them.
pub(super) struct Table<K, V> {
    name: &'static str,
    map: MapData,
    types: PhantomData<fn(K) -> V>,
}

impl<K: Pod, V: Pod> Table<K, V> {
    /// Takes over a map after checking its key and value sizes.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Layout`] if the map is missing, is no hash map, or has other sizes.
    pub(super) fn new(name: &'static str, map: Option<Map>) -> Result<Self, DatapathError> {
        let (Some(Map::HashMap(map)) | Some(Map::LruHashMap(map))) = map else {
            return Err(DatapathError::Layout { name });
        };
        let fits = map.info().is_ok_and(|info| {
            info.key_size() as usize == size_of::<K>()
                && info.value_size() as usize == size_of::<V>()
        });
        if !fits {
            return Err(DatapathError::Layout { name });
        }
        Ok(Self {
            name,
            map,
            types: PhantomData,
        })
    }

    fn error(&self, error: io::Error) -> DatapathError {
        DatapathError::Map {
            name: self.name,
            error,
        }
    }

    pub(super) fn get(&self, key: &K) -> Result<Option<V>, DatapathError> {
        sys::lookup(self.map.fd().as_fd(), key).map_err(|error| self.error(error))
    }

    pub(super) fn insert(&self, key: &K, value: &V) -> Result<(), DatapathError> {
        sys::update(self.map.fd().as_fd(), key, value, sys::ANY).map_err(|error| self.error(error))
    }

    /// Writes a value unless the key exists; returns false if it does.
    pub(super) fn insert_new(&self, key: &K, value: &V) -> Result<bool, DatapathError> {
        match sys::update(self.map.fd().as_fd(), key, value, sys::NOEXIST) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(error) => Err(self.error(error)),
        }
    }

    /// Overwrites a value; does nothing without the key.
    pub(super) fn replace(&self, key: &K, value: &V) -> Result<(), DatapathError> {
        match sys::update(self.map.fd().as_fd(), key, value, sys::EXIST) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(self.error(error)),
            _ => Ok(()),
        }
    }

    /// Removes a key; returns false if there was none.
    pub(super) fn remove(&self, key: &K) -> Result<bool, DatapathError> {
        sys::delete(self.map.fd().as_fd(), key).map_err(|error| self.error(error))
    }

    /// Atomically removes a key and returns its value.
    pub(super) fn take(&self, key: &K) -> Result<Option<V>, DatapathError> {
        sys::take(self.map.fd().as_fd(), key).map_err(|error| self.error(error))
    }

    /// Reads all entries. Entries added or removed at the same time may be missing or present.
    pub(super) fn entries(&self) -> Result<Vec<(K, V)>, DatapathError> {
        sys::entries(self.map.fd().as_fd()).map_err(|error| self.error(error))
    }

    /// Removes the entries whose keys `gone` selects; returns the removed entries. Reads the whole map.
    pub(super) fn remove_if(
        &self,
        gone: impl Fn(&K) -> bool,
    ) -> Result<Vec<(K, V)>, DatapathError> {
        let mut removed = Vec::new();
        for (key, value) in self.entries()? {
            if gone(&key) && self.remove(&key)? {
                removed.push((key, value));
            }
        }
        Ok(removed)
    }
}
