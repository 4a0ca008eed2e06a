//! What the server expects of a store. Several servers may share a store.

use super::{Hoa, Record, Write};

/// Store of records, one for each HoA.
///
/// At its start, a server calls [`watch`](Self::watch), then [`load`](Self::load), so that no change
/// is lost between the two. From then on it only swaps records.
pub trait MappingStore {
    /// Why the store is unusable.
    type Error: std::error::Error;

    /// Calls `each` for every record, in the order of home addresses.
    ///
    /// # Errors
    ///
    /// The store cannot be read.
    fn load(&self, each: impl FnMut(Hoa, Record)) -> Result<(), Self::Error>;

    /// Stores each record whose predecessor has the expected version at that moment, and keeps what is
    /// stored otherwise. A record counts as stored only when it outlives a crash. Returns an outcome
    /// for each write, in their order.
    ///
    /// # Errors
    ///
    /// The store cannot be written. The server takes all writes for failed, even if the store has some
    /// of them: its next write of such a record then loses, and corrects the server.
    fn swap(&self, writes: &[Write]) -> Result<Vec<Swapped>, Self::Error>;

    /// Calls `changed`, from now on, for each record that another server stores. Repeated, old and
    /// overtaken records do no harm.
    ///
    /// # Errors
    ///
    /// The store cannot be watched.
    fn watch(&self, changed: impl FnMut(Hoa, Record) + Send + 'static) -> Result<(), Self::Error>;
}

/// Outcome of one write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Swapped {
    /// The record is stored.
    Stored,
    /// Another server was first, and its record stays; `None`: the store has no record of the HoA.
    Lost(Option<Record>),
}
