//! Rows for the operator of the relay.

use std::collections::{BTreeMap, BTreeSet};

use super::RelayError;
use super::event_loop::RelayLoop;
use crate::clock::now;
use crate::control::report::{
    Holder, MembershipRow, RelayStatus, SessionRow, StreamRow, UplinkRow, age_ms, milliseconds,
};
use crate::runtime::{counters, hooks_of};

impl RelayLoop {
    /// Answers `roamcast status`.
    pub(super) fn status(&self) -> Result<RelayStatus, RelayError> {
        let now = now();
        let hooks = self.datapath.hooks()?;
        let usages: BTreeMap<_, _> = self.datapath.subscriber_usages()?.into_iter().collect();
        Ok(RelayStatus {
            relay: self.config.relay.name.to_string(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_ms: age_ms(now, self.started.0),
            address: self.address,
            lease_ms: milliseconds(self.config.relay.lease),
            pin_path: self.datapath.pin_path().display().to_string(),
            interfaces: self
                .interfaces
                .iter()
                .map(|interface| UplinkRow {
                    name: interface.name.clone(),
                    ifindex: interface.ifindex,
                    hooks: hooks_of(&hooks, interface.ifindex),
                })
                .collect(),
            agents: self.proto.connected_agents().map(str::to_owned).collect(),
            memberships: self
                .proto
                .memberships()
                .map(|membership| {
                    let by_socket = self
                        .interfaces
                        .iter()
                        .any(|interface| interface.is_held_by_socket(&membership.key));
                    let holder = if by_socket {
                        Holder::Socket
                    } else {
                        Holder::Kernel
                    };
                    MembershipRow::new(&membership, holder)
                })
                .collect(),
            sessions: self
                .proto
                .sessions()
                .map(|session| {
                    let usage = |flow: &crate::proto::relay::FlowView| {
                        usages.get(&flow.key).copied().unwrap_or_default()
                    };
                    SessionRow::new(&session, usage, now)
                })
                .collect(),
            counters: self.counters()?,
        })
    }

    /// Answers `roamcast streams`.
    pub(super) fn streams(&self) -> Result<Vec<StreamRow>, RelayError> {
        let now = now();
        let managed: BTreeSet<_> = self.proto.memberships().map(|it| it.key).collect();
        let streams = self.datapath.all_streams()?;
        Ok(streams
            .iter()
            .map(|(key, value)| {
                let mode = managed.contains(&key.managed()).then_some("native");
                StreamRow::new(key, value, mode, now)
            })
            .collect())
    }

    /// Returns the counters of the kernel programs, the protocol and the connections, without
    /// zeros.
    fn counters(&self) -> Result<BTreeMap<String, u64>, RelayError> {
        let proto = self.proto.counters();
        let signalling = [
            ("frames_malformed", proto.malformed_frames),
            ("requests_refused", proto.refused_requests),
            ("sessions_expired", proto.expired_sessions),
            ("flows_refused", proto.refused_flows),
        ];
        let own = self.datapath.counters()?.into_iter().chain(signalling);
        Ok(counters(own, &self.peers))
    }
}
