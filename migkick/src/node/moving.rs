//! I/O of a migration: the prepared NIC and the probe of DstAgent.

use std::net::Ipv6Addr;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::interface::Interface;
use anyhow::{Context, bail};
use linux::netlink::Netlink;

use super::config::contains;
use super::control::{Prepare, Prepared};
use super::core::Place;
use super::daemon::Daemon;
use super::probe::Probe;
use crate::identifier::{self, Secret};
use crate::nic::{IdleNic, NicError, Plan};

/// Longest wait of a prepared node for the agents, and for a VM with an unknown outcome.
const PATIENCE: Duration = Duration::from_secs(120);

/// A migration in progress.
pub(super) struct Moving {
    nic: IdleNic,
    interface: Interface,
    agent: Ipv6Addr,
    /// Time when the node gives the migration up.
    deadline: Option<Duration>,
    probe: Option<Probe>,
    /// Another node has the address.
    pub(super) is_taken: bool,
}

impl Moving {
    pub(super) fn address(&self) -> Ipv6Addr {
        self.nic.plan_address()
    }

    pub(super) fn ifindex(&self) -> u32 {
        self.interface.ifindex
    }

    pub(super) fn join(&mut self) -> Vec<NicError> {
        self.nic.join()
    }

    pub(super) fn settle(self) -> Vec<NicError> {
        self.nic.settle()
    }

    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.probe.as_ref().map(Probe::fd)
    }

    /// Whether DstAgent has answered a probe.
    pub(super) fn is_answered(&mut self) -> bool {
        self.probe.as_mut().is_some_and(Probe::is_answered)
    }

    pub(super) fn poll_timeout(&self) -> Duration {
        let probe = self.probe.as_ref().map(|it| it.next);
        let times = probe.into_iter().chain(self.deadline);
        times.min().unwrap_or(Duration::MAX)
    }

    /// Sends a due probe; returns whether the migration has timed out.
    pub(super) fn handle_timeout(&mut self, now: Duration) -> bool {
        if let Some(probe) = &mut self.probe {
            probe.handle_timeout(now);
        }
        self.deadline.is_some_and(|deadline| now >= deadline)
    }
}

impl Daemon {
    /// Chooses the MoA, configures the NIC with it, and puts the MoA on standby.
    pub(super) fn prepare(&mut self, request: &Prepare) -> anyhow::Result<Prepared> {
        // The agents migrate a VM once at a time, so an earlier migration is over.
        self.abort(false);
        let Some(active) = self.core.active() else {
            bail!("The node has no address on any NIC, so it cannot be reached anyway");
        };
        let named = self
            .interfaces
            .iter()
            .find(|it| it.name == request.interface);
        let Some(interface) = named.cloned() else {
            bail!(
                "The node does not use {}; see `interfaces` in its key file",
                request.interface
            );
        };
        if interface.ifindex == active.ifindex {
            bail!(
                "{} is the active NIC of the node; name the other one",
                interface.name
            );
        }
        let (prefix, length) = (request.prefix, request.length);
        let identity = &self.config.identity;
        if length > 128
            || prefix.is_multicast()
            || prefix.is_unicast_link_local()
            || contains(identity.home, prefix)
        {
            bail!(
                "The agent named {prefix}/{length}, which is no prefix for a VM; set agent.prefix at the destination"
            );
        }
        let secret = request.secret.as_deref().map(Secret::parse).transpose()?;
        let address = identifier::neutral_address(
            request.identifier,
            || secret.map_or_else(Secret::of_machine, Ok),
            (prefix, length),
            interface.mac,
            identity.hoa,
            |it| it == request.agent || it == active.moa || self.taken.contains(&it),
        )?;
        let mut routers = self.config.routers.iter();
        let known = routers.find(|it| contains((prefix, length), **it)).copied();
        let plan = Plan {
            address,
            prefix_length: length,
            agent_address: request.agent,
            router: request.router.or(known),
        };
        let netlink = Netlink::open().context("Cannot open a netlink socket")?;
        let nic = IdleNic::prepare(netlink, interface.clone(), plan)?;
        let network = (address, length);
        self.datapath
            .plan_routes(&interface, network, plan.router)?;
        let now = self.now();
        let mac = interface.mac;
        let own = self.core.own().into_iter().map(|it| it.moa);
        let forward = own.filter(|it| *it != address).collect();
        let ifindex = interface.ifindex;
        self.moving = Some(Moving {
            nic,
            interface,
            agent: request.agent,
            deadline: Some(now + PATIENCE),
            probe: None,
            is_taken: false,
        });
        self.core.prepare(
            now,
            Place {
                ifindex,
                moa: address,
            },
        );
        Ok(Prepared {
            address,
            mac,
            forward,
            forward_s: u32::try_from(self.config.forward.as_secs()).unwrap_or(u32::MAX),
        })
    }

    /// From now on the agents may migrate the VM. Returns whether they may translate packets from
    /// the VM's old addresses.
    pub(super) fn ready(&mut self, near: bool) -> bool {
        let now = self.now();
        let translate = self.core.ready(now);
        let Some(moving) = &mut self.moving else {
            return false;
        };
        moving.deadline = None;
        if moving.probe.is_none() {
            let (nic, address) = (&moving.interface, moving.nic.plan_address());
            match Probe::open(now, nic, address, moving.agent) {
                Ok(probe) => moving.probe = Some(probe),
                Err(error) => {
                    eprintln!(
                        "Cannot probe for DstAgent: {error}; the kernel's announcement has to do"
                    );
                }
            }
        }
        if let Some(probe) = &mut moving.probe
            && near
            && !probe.near
        {
            probe.near = true;
            probe.next = now;
        }
        translate
    }

    /// Handles an unknown outcome of the migration.
    pub(super) fn lost(&mut self) {
        let deadline = self.now() + PATIENCE;
        if let Some(moving) = &mut self.moving {
            moving.deadline = Some(deadline);
        }
    }

    /// Aborts the migration, unless the VM has arrived.
    pub(super) fn abort(&mut self, taken: bool) {
        if self.core.stage().is_none() {
            return;
        }
        let now = self.now();
        self.core.abort(now);
        if let Err(error) = self.datapath.forget_plan() {
            self.say(&format!("{:#}", anyhow::Error::new(error)));
        }
        // Dropping `Moving` restores the NIC.
        if let Some(moving) = self.moving.take()
            && taken
        {
            self.taken.insert(moving.address());
        }
    }
}
