//! Performs the outputs of the relay's protocol.

use std::net::Ipv6Addr;
use std::time::Duration;

use common::maps::{ManagedKey, Origins};
use tokio::time::Instant;

use super::RelayError;
use super::event_loop::RelayLoop;
use crate::clock::now;
use crate::proto::relay::RelayOutput;
use crate::proto::{DatapathEvent, Membership};

/// Longest wait for a next hop to answer.
const RESOLVE_TIMEOUT: Duration = Duration::from_millis(2500);

impl RelayLoop {
    /// Performs outputs until the protocol has none left.
    pub(super) fn perform_outputs(&mut self) -> Result<(), RelayError> {
        while let Some(output) = self.proto.poll_output() {
            self.perform(output)?;
        }
        Ok(())
    }

    fn perform(&mut self, output: RelayOutput) -> Result<(), RelayError> {
        match output {
            RelayOutput::Frame { peer, bytes } => self.peers.send(&peer, bytes),
            RelayOutput::Join(membership) => self.join(&membership),
            RelayOutput::Leave(key) => {
                for interface in &mut self.interfaces {
                    interface.leave(&key);
                }
            }
            RelayOutput::Manage { key, since } => {
                if let Err(error) = self.datapath.manage(&key, since, Origins::Native) {
                    self.failed(key, &error);
                }
            }
            RelayOutput::Unmanage(key) => self.datapath.unmanage(&key)?,
            RelayOutput::StreamSet { key, value } => {
                if let Err(error) = self.datapath.relay_stream_set(&key, &value) {
                    self.failed(key.managed(), &error);
                }
            }
            RelayOutput::StreamRemove(key) => {
                self.datapath.relay_stream_remove(&key)?;
            }
            RelayOutput::SubscriberSet {
                stream,
                key,
                value,
                reset_usage,
            } => {
                if reset_usage {
                    self.datapath.subscriber_usage_reset(&key)?;
                }
                if let Err(error) = self.datapath.subscriber_set(&key, &value) {
                    self.failed(stream.managed(), &error);
                }
            }
            RelayOutput::SubscriberRemove(key) => {
                self.datapath.subscriber_remove(&key)?;
                self.datapath.subscriber_usage_reset(&key)?;
            }
            RelayOutput::Resolve { agent_address } => {
                let deadline = Instant::now() + RESOLVE_TIMEOUT;
                self.resolve(agent_address, deadline);
            }
            RelayOutput::Forget { agent_address } => {
                self.resolving.remove(&agent_address);
                self.neighbours.forget(agent_address);
            }
            RelayOutput::ReadStreams { keys } => {
                // A relay reads streams for one purpose only, so the answer needs no token.
                self.stream_reads.ask(0, keys);
            }
        }
        Ok(())
    }

    fn join(&mut self, membership: &Membership) {
        let mut failure = None;
        for interface in &mut self.interfaces {
            if let Err(error) = interface.join(membership) {
                failure = Some(error);
            }
        }
        if let Some(error) = failure {
            self.failed(membership.key, &error);
        }
    }

    fn failed(&mut self, key: ManagedKey, error: &(dyn std::error::Error + 'static)) {
        tracing::warn!(error, "An address cannot be served");
        let reason = error.to_string();
        self.proto
            .handle_datapath(now(), DatapathEvent::Failed { key, reason });
    }

    /// Checks whether unresolved next hops have answered.
    pub(super) fn resolve_again(&mut self) {
        for (agent_address, deadline) in std::mem::take(&mut self.resolving) {
            self.resolve(agent_address, deadline);
        }
    }

    fn resolve(&mut self, agent_address: Ipv6Addr, deadline: Instant) {
        let result = match self.neighbours.resolve(agent_address) {
            Ok(true) => Ok(()),
            Ok(false) if Instant::now() < deadline => {
                self.resolving.insert(agent_address, deadline);
                return;
            }
            Ok(false) => Err("the next hop does not answer".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        self.proto.handle_neighbour(now(), agent_address, result);
    }
}
