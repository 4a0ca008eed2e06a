//! Programs on interfaces: which, where, attached, adopted, detached.

use std::fs;

use serde::Deserialize;

use super::link::{self, Interface};
use super::{Datapath, DatapathError, Limits, driver, lock, pins};

pub(super) const LOOPBACK_FORWARDING: &str = "/proc/sys/net/ipv6/conf/lo/forwarding";

/// Where programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// TCX (kernel 6.6).
    Tcx,
    /// Filter of the `clsact` qdisc.
    Clsact,
    /// XDP in the driver.
    XdpNative,
    /// XDP after the driver, on socket buffers.
    XdpGeneric,
}

impl Hook {
    /// Name for the operator.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
            Self::XdpNative => "xdp-native",
            Self::XdpGeneric => "xdp-generic",
        }
    }
}

/// Where an operator wants relayed packets to be restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UplinkHook {
    /// XDP in the driver; TC where the driver refuses.
    XdpNative,
    /// XDP after the driver. Costs more than TC, and restored checksums are wrong where the sender
    /// leaves them to the hardware, as `veth` and `virtio_net` do.
    XdpGeneric,
    /// TC ingress: right everywhere.
    Tc,
}

/// The kernel programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Program {
    /// On a TAP: MLD snooping and the mark of signalling datagrams.
    Snoop,
    /// On a TAP's other way, into the VM: what is delivered, and the frames of a handover.
    Gate,
    /// On an uplink: streams, Queries, and relayed packets, which it restores.
    Uplink,
    /// On an uplink's way out: what was restored here does not leave.
    Leak,
    /// On a relay's interface: copies of streams for the subscribers.
    Replicate,
}

impl Program {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::Snoop,
        Self::Gate,
        Self::Uplink,
        Self::Leak,
        Self::Replicate,
    ];

    /// Name in the kernel; that of `uplink` at XDP is `uplink_xdp`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Snoop => "snoop",
            Self::Gate => "gate",
            Self::Uplink => "uplink",
            Self::Leak => "leak",
            Self::Replicate => "replicate",
        }
    }
}

/// A program on an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The program.
    pub program: Program,
    /// Interface index.
    pub ifindex: u32,
    /// Name of the interface when it was attached.
    pub interface: String,
    /// Where it is attached.
    pub hook: Hook,
    /// Whether a pinned link of an earlier agent was taken over.
    pub adopted: bool,
}

impl Datapath {
    /// Attaches `snoop` and `gate` to a TAP, with the limits of its VM, or adopts the pinned links.
    /// Returns the attachment of `snoop`. May be called again, to change the limits.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Attach`], for instance because the TAP is gone again;
    /// [`DatapathError::Map`] when there are more ports than the maps have room for.
    pub fn attach_port(
        &self,
        ifindex: u32,
        name: &str,
        limits: &Limits,
    ) -> Result<Attachment, DatapathError> {
        // The limits come first: the program drops Reports of a port that has none.
        self.set_limits(ifindex, limits)?;
        let attached = self
            .attach(Program::Snoop, ifindex, name)
            .and_then(|snoop| self.attach(Program::Gate, ifindex, name).map(|_| snoop));
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
        self.attach(Program::Uplink, ifindex, name)
    }

    /// Attaches `leak` to a port of the bridge that is no TAP, or adopts the pinned link. For
    /// uplinks, [`Datapath::attach_uplink`] does.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Attach`].
    pub fn attach_leak(&self, ifindex: u32, name: &str) -> Result<Attachment, DatapathError> {
        self.attach(Program::Leak, ifindex, name)
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
        self.attach(Program::Replicate, ifindex, name)
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
    /// `leak` stays where this agent has attached it.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Pin`], [`DatapathError::Map`].
    pub fn retain(&self, ports: &[u32], uplinks: &[u32]) -> Result<(), DatapathError> {
        for (_, pin, ifindex) in self.inner.pins.links()? {
            match link::program_of_pin(&pin) {
                Some(program @ (Program::Snoop | Program::Gate)) if !ports.contains(&ifindex) => {
                    self.detach(program, ifindex)?;
                }
                Some(Program::Uplink) if !uplinks.contains(&ifindex) => {
                    self.detach(Program::Uplink, ifindex)?;
                    self.forget_queriers(ifindex)?;
                }
                Some(Program::Leak)
                    if !lock(&self.inner.attached).contains_key(&(Program::Leak, ifindex)) =>
                {
                    self.detach(Program::Leak, ifindex)?;
                }
                _ => {}
            }
        }
        self.forget_ports_except(ports)
    }

    /// Detaches `replicate` from every interface that is not among these.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Pin`].
    pub fn retain_replicate(&self, interfaces: &[u32]) -> Result<(), DatapathError> {
        for (_, pin, ifindex) in self.inner.pins.links()? {
            if link::program_of_pin(&pin) == Some(Program::Replicate)
                && !interfaces.contains(&ifindex)
            {
                self.detach_replicate(ifindex)?;
            }
        }
        Ok(())
    }

    /// What is attached by this agent, for the operator.
    pub fn attachments(&self) -> Vec<Attachment> {
        lock(&self.inner.attached).values().cloned().collect()
    }

    /// Removes pins and state of interfaces that are gone.
    pub(super) fn remove_vanished(&self) -> Result<(), DatapathError> {
        // nix 0.30 answers an empty name for an interface that is gone.
        let exists =
            |ifindex| nix::net::if_::if_indextoname(ifindex).is_ok_and(|name| !name.is_empty());
        for (path, program, ifindex) in self.inner.pins.links()? {
            if !exists(ifindex) {
                tracing::info!(
                    program,
                    ifindex,
                    "removing the pin of an interface that is gone"
                );
                pins::remove(&path)?;
            }
        }
        self.forget_ports_if(|ifindex| !exists(ifindex))
    }

    fn attach(
        &self,
        program: Program,
        ifindex: u32,
        name: &str,
    ) -> Result<Attachment, DatapathError> {
        if let Some(attachment) = lock(&self.inner.attached).get(&(program, ifindex)) {
            return Ok(attachment.clone());
        }
        let interface = Interface {
            index: ifindex,
            name,
        };
        let (hook, adopted) = if program == Program::Uplink {
            self.attach_uplink_program(interface)?
        } else {
            (self.inner.hook, self.attach_tc(program, interface)?)
        };
        let attachment = Attachment {
            program,
            ifindex,
            interface: name.to_owned(),
            hook,
            adopted,
        };
        lock(&self.inner.attached).insert((program, ifindex), attachment.clone());
        Ok(attachment)
    }

    /// Attaches `uplink` to the hook that suits, and then detaches it from all others: a packet
    /// that both see is restored once, because a restored one is left alone.
    fn attach_uplink_program(
        &self,
        interface: Interface<'_>,
    ) -> Result<(Hook, bool), DatapathError> {
        if let Some(hook) = self.xdp_hook(interface) {
            // An interface has one mode of XDP at a time.
            self.detach_other_xdp(hook, interface)?;
            match self.attach_xdp(hook, interface) {
                Ok(adopted) => {
                    self.detach_uplink_except(Some(hook), interface)?;
                    return Ok((hook, adopted));
                }
                Err(error) => tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    hook = hook.as_str(),
                    "Hook refused, using TC"
                ),
            }
        }
        let hook = self.inner.hook;
        let adopted = self.attach_tc(Program::Uplink, interface)?;
        self.detach_uplink_except(Some(hook), interface)?;
        Ok((hook, adopted))
    }

    /// The XDP hook to try, if one.
    fn xdp_hook(&self, interface: Interface<'_>) -> Option<Hook> {
        let suits = driver::suits_xdp(interface.name);
        let hook = match self.inner.uplink_hook {
            Some(UplinkHook::Tc) => return None,
            Some(UplinkHook::XdpNative) => Hook::XdpNative,
            Some(UplinkHook::XdpGeneric) => Hook::XdpGeneric,
            None => {
                let pinned = |hook| self.uplink_is_pinned(hook, interface.index);
                if pinned(Hook::Tcx) {
                    return None;
                }
                if let Some(hook) = [Hook::XdpNative, Hook::XdpGeneric]
                    .into_iter()
                    .find(|hook| pinned(*hook))
                {
                    return Some(hook);
                }
                return match suits {
                    Ok(()) => Some(Hook::XdpNative),
                    Err(reason) => {
                        tracing::info!(interface = interface.name, %reason, "Uplink uses TC");
                        None
                    }
                };
            }
        };
        if let Err(reason) = suits {
            tracing::warn!(
                interface = interface.name,
                hook = hook.as_str(),
                %reason,
                "The configured hook may see frames that are not finished; TC is right everywhere"
            );
        }
        Some(hook)
    }

    fn detach(&self, program: Program, ifindex: u32) -> Result<(), DatapathError> {
        let attached = lock(&self.inner.attached).remove(&(program, ifindex));
        let interface = Interface {
            index: ifindex,
            name: attached
                .as_ref()
                .map_or("", |attachment| &attachment.interface),
        };
        if program == Program::Uplink {
            self.detach_uplink_except(None, interface)
        } else {
            self.detach_tc(program, interface)
        }
    }
}
