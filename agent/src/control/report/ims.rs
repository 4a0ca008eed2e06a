//! Rows of a mapping server's `roamcast status`, and of `roamcast ims list`.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

use crate::proto::ims::{Hoa, Record};

/// `roamcast status` of a mapping server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImsStatus {
    /// Where nodes send to.
    pub listen: String,
    /// Home prefix.
    pub home: String,
    /// Where mappings are kept.
    pub store: String,
    /// Its version.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Since its start.
    pub uptime_ms: u64,
    /// Nodes that are known.
    pub nodes: usize,
    /// Those of them that have a mapping.
    pub mappings: usize,
    /// Longest transaction of the store.
    pub longest_commit_ms: u64,
    /// Why the last transaction failed.
    pub store_error: Option<String>,
    /// Counters that are not zero.
    pub counters: BTreeMap<String, u64>,
}

/// A node that is enrolled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRow {
    /// Its HoA.
    pub hoa: Ipv6Addr,
    /// Generation of its key.
    pub generation: u32,
    /// Sequence of its last update.
    pub sequence: u64,
    /// Its mapping; none if it has none now.
    pub moas: Vec<MoaRow>,
    /// Until the mapping ends.
    pub lifetime_left_ms: Option<u64>,
    /// Addresses that it no longer has, and nobody else may have yet.
    pub quarantine: Vec<Ipv6Addr>,
}

/// One address of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoaRow {
    /// The address.
    pub address: Ipv6Addr,
    /// 1 is where data goes; a higher number stands by.
    pub priority: u8,
}

impl NodeRow {
    /// The row of what is stored.
    pub fn new(hoa: Hoa, record: &Record, wall_ms: u64) -> Self {
        let lives = !record.moas.is_empty() && record.until_ms > wall_ms;
        let moas = record.moas.iter().filter(|_| lives);
        let freed = record.freed.iter().filter(|it| it.until_ms > wall_ms);
        Self {
            hoa: hoa.into(),
            generation: record.generation,
            sequence: record.sequence,
            moas: moas
                .map(|moa| MoaRow {
                    address: (*moa.address).into(),
                    priority: moa.priority,
                })
                .collect(),
            lifetime_left_ms: lives.then(|| record.until_ms - wall_ms),
            quarantine: freed.map(|it| (*it.address).into()).collect(),
        }
    }
}
