//! Attaches programs to interfaces, adopts attachments, and detaches programs.

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

/// Hook and filter list of a program, and whether an earlier attachment was adopted.
pub(super) type Attached = (Hook, Option<Parent>, bool);

impl Datapath {
    /// Attaches `snoop` and `gate` to a TAP with the limits of its VM, or adopts existing
    /// attachments. Returns the attachment of `snoop`. A second call changes the limits.
    ///
    /// Without TCX the call may add qdiscs to the TAP. libvirt then cannot add its own qdiscs
    /// unless it deletes the existing ones first, as it does. Do not call this while libvirt may be
    /// between its deletion and its addition; see [`Self::attach_port_to_what_is_there`].
    ///
    /// # Errors
    ///
    /// [`DatapathError::Attach`], for instance because the TAP was deleted; [`DatapathError::Map`]
    /// if the maps have no room for another port. Nothing stays attached then.
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

    /// As [`Self::attach_port`], but adds no qdisc; returns `None` if a program needs a qdisc that
    /// does not exist.
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
        // The limits precede the program, which drops the Reports of a port without limits.
        self.set_limits(ifindex, limits)?;
        // `gate` first: only `gate` may lack a place, and then nothing has changed.
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

    /// Attaches `leak` and `uplink` to an uplink of the bridge, or adopts pinned links. Returns the
    /// attachment of `uplink`.
    ///
    /// `uplink` uses the configured hook. Without one it keeps the hook of an earlier agent.
    /// Otherwise it uses native XDP if the driver is that of a physical interface and accepts the
    /// program, and TC if not.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Attach`].
    pub fn attach_uplink(&self, ifindex: u32, name: &str) -> Result<Attachment, DatapathError> {
        // `leak` first, so that no restored packet can leave.
        self.attach_leak(ifindex, name)?;
        self.attach_anyhow(Program::Uplink, ifindex, name)
    }

    /// Attaches `leak` to a port of the bridge that is neither TAP nor uplink, or adopts the pinned
    /// link. [`Datapath::attach_uplink`] does this for uplinks.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Attach`].
    pub fn attach_leak(&self, ifindex: u32, name: &str) -> Result<Attachment, DatapathError> {
        self.attach_anyhow(Program::Leak, ifindex, name)
    }

    /// Detaches `leak` from an interface.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Pin`].
    pub fn detach_leak(&self, ifindex: u32) -> Result<(), DatapathError> {
        self.detach(Program::Leak, ifindex)
    }

    /// Attaches `replicate` to an interface on which a relay receives multicast, or adopts the
    /// pinned link. Enables `net.ipv6.conf.lo.forwarding`, because the kernel looks up no routes
    /// for programs without it; the setting by itself lets no packet through this host. A second
    /// call enables the setting again.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Attach`], [`DatapathError::Forwarding`].
    pub fn attach_replicate(&self, ifindex: u32, name: &str) -> Result<Attachment, DatapathError> {
        fs::write(LOOPBACK_FORWARDING, "1").map_err(DatapathError::Forwarding)?;
        self.attach_anyhow(Program::Replicate, ifindex, name)
    }

    /// Detaches `snoop` and `gate` from a TAP that was deleted or left the bridge. Removes its
    /// listeners, sources, limits, gate and counts. Does nothing for an unknown port. Reads whole
    /// maps.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Pin`], [`DatapathError::Map`].
    pub fn detach_port(&self, ifindex: u32) -> Result<(), DatapathError> {
        // Does every part, even if one fails.
        let detached = [Program::Snoop, Program::Gate].map(|program| self.detach(program, ifindex));
        self.forget_port(ifindex)?;
        detached.into_iter().collect()
    }

    /// Detaches `uplink` and `leak` from an uplink, and removes its querier.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Pin`], [`DatapathError::Map`].
    pub fn detach_uplink(&self, ifindex: u32) -> Result<(), DatapathError> {
        self.detach(Program::Uplink, ifindex)?;
        self.detach(Program::Leak, ifindex)?;
        self.forget_queriers(ifindex)
    }

    /// Detaches `replicate`: streams received on this interface are no longer copied.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Pin`].
    pub fn detach_replicate(&self, ifindex: u32) -> Result<(), DatapathError> {
        self.detach(Program::Replicate, ifindex)
    }

    /// Detaches every port and uplink that is not in these lists: an earlier agent attached them,
    /// and they are no longer ports. Call this once the ports of the bridge are known. `leak` stays
    /// on the interfaces to which this agent attached it, and the attachments of this agent to
    /// listed interfaces stay too.
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

    /// Detaches `replicate` from every interface that is not in the list.
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

    /// Returns the attachments of this agent and of earlier ones.
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

    /// Returns the attachments of this agent, for display.
    pub fn attachments(&self) -> Vec<Attachment> {
        lock(&self.inner.attached).values().cloned().collect()
    }

    /// Removes the pins and the state of deleted interfaces.
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

    /// Attaches a program to TC; `None` if that needs a qdisc that may not be added.
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
        // An agent with TCX may have left the same program in a link.
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
