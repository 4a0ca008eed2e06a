//! Programs on interfaces: attached, adopted, detached.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _};

use linux::bpf::link::{Interface, chain, exists, same_interface};
use linux::bpf::pins::{LinkPin, remove_link};

use super::filter::{FilterError, Make};
use super::hook::{Attachment, Hook, Program};
use super::link::attach_error;
use super::{Datapath, DatapathError, Limits, link, lock};
use crate::net::tc::Parent;

pub(super) const LOOPBACK_FORWARDING: &str = "/proc/sys/net/ipv6/conf/lo/forwarding";

/// Where a program is, and whether that was adopted.
pub(super) type Attached = (Hook, Option<Parent>, bool);

impl Datapath {
    /// Attaches `snoop` and `gate` to a TAP, with the limits of its VM, or adopts what is there.
    /// Returns the attachment of `snoop`. May be called again, to change the limits.
    ///
    /// Without TCX this may add qdiscs to the TAP, and then libvirt cannot add its own ones, unless it
    /// deletes those first, as it does: so not while libvirt may be between the two. See
    /// [`Self::attach_port_to_what_is_there`].
    ///
    /// # Errors
    ///
    /// [`DatapathError::Attach`], for instance because the TAP is gone again;
    /// [`DatapathError::Map`] when there are more ports than the maps have room for. Nothing stays
    /// attached.
    pub fn attach_port(
        &self,
        ifindex: u32,
        name: &str,
        limits: &Limits,
    ) -> Result<Attachment, DatapathError> {
        let attached = self.attach_to_tap(ifindex, name, limits, Make::Qdiscs)?;
        attached.ok_or_else(|| {
            let interface = Interface {
                index: ifindex,
                name,
            };
            let reason = "its qdiscs do not stay as they are".to_owned();
            attach_error(Program::Snoop, interface, reason)
        })
    }

    /// The same, as far as it can be done without a new qdisc; `None` if a program is not attached
    /// for want of one.
    ///
    /// # Errors
    ///
    /// As for [`Self::attach_port`].
    pub fn attach_port_to_what_is_there(
        &self,
        ifindex: u32,
        name: &str,
        limits: &Limits,
    ) -> Result<Option<Attachment>, DatapathError> {
        self.attach_to_tap(ifindex, name, limits, Make::Nothing)
    }

    fn attach_to_tap(
        &self,
        ifindex: u32,
        name: &str,
        limits: &Limits,
        make: Make,
    ) -> Result<Option<Attachment>, DatapathError> {
        // The limits come first: the program drops Reports of a port that has none.
        self.set_limits(ifindex, limits)?;
        // `gate` is what may find no place; then nothing has been changed.
        let attached = self
            .attach(Program::Gate, ifindex, name, make)
            .and_then(|gate| {
                let snoop = self.attach(Program::Snoop, ifindex, name, make)?;
                Ok(gate.and(snoop))
            });
        if attached.is_err()
            && let Err(error) = self.detach_port(ifindex)
        {
            tracing::warn!(ifindex, %error, "Port not detached after it could not be attached");
        }
        attached
    }

    /// Attaches `leak` and `uplink` to an uplink of the bridge, or adopts the pinned links. Returns
    /// the attachment of `uplink`.
    ///
    /// The hook of `uplink` is the configured one; else the one that an earlier agent used; else
    /// native XDP where the driver is that of a physical interface, and TC where it is not or the
    /// driver refuses.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Attach`].
    pub fn attach_uplink(&self, ifindex: u32, name: &str) -> Result<Attachment, DatapathError> {
        // First, so that nothing restored can leave.
        self.attach_leak(ifindex, name)?;
        self.attach_anyhow(Program::Uplink, ifindex, name)
    }

    /// Attaches `leak` to a port of the bridge that is no TAP, or adopts the pinned link. For
    /// uplinks, [`Datapath::attach_uplink`] does.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Attach`].
    pub fn attach_leak(&self, ifindex: u32, name: &str) -> Result<Attachment, DatapathError> {
        self.attach_anyhow(Program::Leak, ifindex, name)
    }

    /// Detaches `leak`.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Pin`].
    pub fn detach_leak(&self, ifindex: u32) -> Result<(), DatapathError> {
        self.detach(Program::Leak, ifindex)
    }

    /// Attaches `replicate` to an interface that a relay receives multicast by, or adopts the
    /// pinned link. Switches `net.ipv6.conf.lo.forwarding` on, without which the kernel looks up
    /// no routes for programs; it lets nothing through this host. May be called again, to switch
    /// it on again.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Attach`], [`DatapathError::Forwarding`].
    pub fn attach_replicate(&self, ifindex: u32, name: &str) -> Result<Attachment, DatapathError> {
        fs::write(LOOPBACK_FORWARDING, "1").map_err(DatapathError::Forwarding)?;
        self.attach_anyhow(Program::Replicate, ifindex, name)
    }

    /// Detaches `snoop` and `gate` from a TAP that is gone or left the bridge, and removes its
    /// listeners, sources, limits, gate and what it counted. Does nothing for a port that is not
    /// known. Reads whole maps.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Pin`], [`DatapathError::Map`].
    pub fn detach_port(&self, ifindex: u32) -> Result<(), DatapathError> {
        // All of it, even if one part fails.
        let detached = [Program::Snoop, Program::Gate].map(|program| self.detach(program, ifindex));
        self.forget_port(ifindex)?;
        detached.into_iter().collect()
    }

    /// Detaches `uplink` and `leak` likewise, and forgets the uplink's querier.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Pin`], [`DatapathError::Map`].
    pub fn detach_uplink(&self, ifindex: u32) -> Result<(), DatapathError> {
        self.detach(Program::Uplink, ifindex)?;
        self.detach(Program::Leak, ifindex)?;
        self.forget_queriers(ifindex)
    }

    /// Detaches `replicate`: no more copies of what comes in by this interface.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Pin`].
    pub fn detach_replicate(&self, ifindex: u32) -> Result<(), DatapathError> {
        self.detach(Program::Replicate, ifindex)
    }

    /// Detaches, as above, every port and uplink that is not among these: what an earlier agent
    /// attached and is no longer a port. To be called when the ports of the bridge are known.
    /// `leak` stays where this agent has attached it, and so does what this agent has attached to
    /// any of these.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Pin`], [`DatapathError::Map`].
    pub fn retain(&self, ports: &[u32], uplinks: &[u32]) -> Result<(), DatapathError> {
        for (program, ifindex) in self.left_behind()? {
            let stays = match program {
                Program::Snoop | Program::Gate => ports.contains(&ifindex),
                Program::Uplink => uplinks.contains(&ifindex),
                Program::Leak => lock(&self.inner.attached).contains_key(&(Program::Leak, ifindex)),
                Program::Replicate => true,
            };
            if !stays {
                self.detach(program, ifindex)?;
                if program == Program::Uplink {
                    self.forget_queriers(ifindex)?;
                }
            }
        }
        if self.inner.hook == Hook::Filter {
            let deleted = lock(&self.inner.filters).delete_empty_roots(ports);
            tracing::debug!(?deleted, "root qdiscs of an earlier agent");
        }
        self.forget_ports_except(ports)
    }

    /// Detaches `replicate` from every interface that is not among these.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Pin`].
    pub fn retain_replicate(&self, interfaces: &[u32]) -> Result<(), DatapathError> {
        for (program, ifindex) in self.left_behind()? {
            if program == Program::Replicate && !interfaces.contains(&ifindex) {
                self.detach_replicate(ifindex)?;
            }
        }
        Ok(())
    }

    /// What is attached by this agent or an earlier one, and where.
    fn left_behind(&self) -> Result<BTreeSet<(Program, u32)>, DatapathError> {
        let pinned = self.inner.pins.links()?;
        let mut found: BTreeSet<(Program, u32)> = pinned
            .into_iter()
            .filter_map(|pin| Some((link::program_of_pin(&pin.program)?, pin.ifindex)))
            .collect();
        if self.inner.hook == Hook::Filter {
            let filters = lock(&self.inner.filters).all();
            found.extend(filters.map_err(DatapathError::TrafficControl)?);
        }
        Ok(found)
    }

    /// What is attached by this agent, for the operator.
    pub fn attachments(&self) -> Vec<Attachment> {
        lock(&self.inner.attached).values().cloned().collect()
    }

    /// Removes pins and state of interfaces that are gone.
    pub(super) fn remove_vanished(&self) -> Result<(), DatapathError> {
        for LinkPin {
            path,
            program,
            ifindex,
        } in self.inner.pins.links()?
        {
            if !exists(ifindex) {
                tracing::info!(
                    program,
                    ifindex,
                    "removing the pin of an interface that is gone"
                );
                remove_link(&path)?;
            }
        }
        self.forget_ports_if(|ifindex| !exists(ifindex))
    }

    fn attach_anyhow(
        &self,
        program: Program,
        ifindex: u32,
        name: &str,
    ) -> Result<Attachment, DatapathError> {
        let attached = self.attach(program, ifindex, name, Make::Qdiscs)?;
        attached.ok_or_else(|| DatapathError::Attach {
            program: program.name(),
            interface: name.to_owned(),
            ifindex,
            reason: "its qdiscs do not stay as they are".to_owned(),
        })
    }

    fn attach(
        &self,
        program: Program,
        ifindex: u32,
        name: &str,
        make: Make,
    ) -> Result<Option<Attachment>, DatapathError> {
        let _hooks = lock(&self.inner.hooks);
        if let Some(attachment) = lock(&self.inner.attached).get(&(program, ifindex)) {
            return Ok(Some(attachment.clone()));
        }
        let interface = Interface {
            index: ifindex,
            name,
        };
        let attached = if program == Program::Uplink {
            self.attach_uplink_program(interface, make)?
        } else {
            self.attach_tc(program, interface, make)?
        };
        let Some((hook, parent, adopted)) = attached else {
            return Ok(None);
        };
        let attachment = Attachment {
            program,
            ifindex,
            interface: name.to_owned(),
            hook,
            parent,
            adopted,
        };
        lock(&self.inner.attached).insert((program, ifindex), attachment.clone());
        self.warn_of_order(&attachment);
        Ok(Some(attachment))
    }

    /// Attaches a program to TC; `None` for want of a qdisc.
    pub(super) fn attach_tc(
        &self,
        program: Program,
        interface: Interface<'_>,
        make: Make,
    ) -> Result<Option<Attached>, DatapathError> {
        if self.inner.hook != Hook::Filter {
            let adopted = self.attach_tcx(program, interface)?;
            return Ok(Some((Hook::Tcx, None, adopted)));
        }
        let failed = |reason: String| attach_error(program, interface, reason);
        same_interface(interface).map_err(|error| failed(error.to_string()))?;
        if program == Program::Gate {
            self.stop_probes(interface.index)?;
        }
        let made = {
            let mut programs = lock(&self.inner.programs);
            let classifier = link::classifier(&mut programs, program)?;
            let descriptor = classifier.fd().map_err(|error| failed(chain(&error)))?;
            lock(&self.inner.filters)
                .set(
                    program,
                    descriptor.as_fd().as_raw_fd(),
                    (interface.index, interface.name),
                    make,
                )
                .map_err(|error| match error {
                    FilterError::Taken(reason) => failed(reason),
                    FilterError::Refused(refusal) => failed(refusal.to_string()),
                })?
        };
        // The same program may be there by the link of an agent that used TCX.
        remove_link(&self.inner.pins.link(program.name(), interface.index))?;
        Ok(made.map(|made| (Hook::Filter, Some(made.parent), made.replaced)))
    }

    pub(super) fn remove_filter(&self, program: Program, ifindex: u32) {
        if self.inner.hook != Hook::Filter {
            return;
        }
        let removed = lock(&self.inner.filters).remove(ifindex, |it| it == program);
        if let Err(refusal) = removed {
            tracing::warn!(
                program = program.name(),
                ifindex,
                %refusal,
                "A filter stays; `roamcast cleanup` takes it away"
            );
        }
    }

    pub(super) fn detach(&self, program: Program, ifindex: u32) -> Result<(), DatapathError> {
        let _hooks = lock(&self.inner.hooks);
        lock(&self.inner.attached).remove(&(program, ifindex));
        lock(&self.inner.warned).remove(&(program, ifindex));
        if program == Program::Uplink {
            return self.detach_uplink_except(None, ifindex);
        }
        self.remove_filter(program, ifindex);
        Ok(remove_link(&self.inner.pins.link(program.name(), ifindex))?)
    }
}
