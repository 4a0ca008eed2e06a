//! Rows of a mapping server: `roamcast status` and `roamcast ims list`.

use std::collections::BTreeMap;
use std::net::Ipv6Addr;

use serde::{Deserialize, Serialize};

use crate::proto::ims::{Hoa, Record};

/// Answer of a mapping server to `roamcast status`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImsStatus {
    /// Address and port to which nodes send.
    pub listen: String,
    /// Home prefix, with its length.
    pub home: String,
    /// Path of the store's file.
    pub store: String,
    /// Version of the server's program.
    pub version: String,
    /// Process identifier of the server.
    pub pid: u32,
    /// Time since the server started.
    pub uptime_ms: u64,
    /// Number of enrolled nodes.
    pub nodes: usize,
    /// Number of nodes that have a mapping.
    pub mappings: usize,
    /// Duration of the longest transaction of the store.
    pub longest_commit_ms: u64,
    /// Why the last transaction failed; absent if it succeeded.
    pub store_error: Option<String>,
    /// Counters above 0, by name.
    pub counters: BTreeMap<String, u64>,
}

/// An enrolled node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRow {
    /// Home address of the node.
    pub hoa: Ipv6Addr,
    /// Generation of the node's key.
    pub generation: u32,
    /// Sequence number of the node's last update.
    pub sequence: u64,
    /// Mapping of the node; empty if the node has none now.
    pub moas: Vec<MoaRow>,
    /// Time until the mapping expires.
    pub lifetime_left_ms: Option<u64>,
    /// Addresses that the node has given up and that no other node may have yet.
    pub quarantine: Vec<Ipv6Addr>,
}

/// One mobile address (MoA) of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoaRow {
    /// The mobile address.
    pub address: Ipv6Addr,
    /// 1: correspondents send to this address. Higher: a standby address.
    pub priority: u8,
}

impl NodeRow {
    /// Converts a record of the store; `wall_ms` is the current time.
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
