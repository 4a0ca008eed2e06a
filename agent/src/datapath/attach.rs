//! Programs on interfaces: attached, adopted, detached.
//!
//! With TCX the link is pinned, so it outlives the agent, and the next agent exchanges the program
//! in it without a gap. Below kernel 6.6 there is only the `clsact` qdisc: its filter outlives the
//! agent too, but cannot be pinned, and the next agent replaces it with a gap of a few
//! microseconds.

use std::io;

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, qdisc_add_clsact,
    qdisc_detach_program,
};
use aya::programs::{LinkOrder, TcAttachType};

use super::{Datapath, DatapathError, Limits, classifier, lock, pins};

/// Where programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// TCX ingress (kernel 6.6).
    Tcx,
    /// Ingress filter of the `clsact` qdisc.
    Clsact,
}

impl Hook {
    /// Name for the operator.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

/// The kernel programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Program {
    /// On a TAP: MLD snooping and the mark of signalling datagrams.
    Snoop,
    /// On an uplink: streams and Queries.
    Uplink,
}

impl Program {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Snoop, Self::Uplink];

    /// Name in the kernel.
    pub fn name(self) -> &'static str {
        match self {
            Self::Snoop => "snoop",
            Self::Uplink => "uplink",
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
    /// Whether a pinned link of an earlier agent was taken over.
    pub adopted: bool,
}

impl Datapath {
    /// Attaches `snoop` to a TAP, with the limits of its VM, or adopts the pinned link. May be
    /// called again, to change the limits.
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
        let attached = self.attach(Program::Snoop, ifindex, name);
        if attached.is_err() {
            self.forget_port(ifindex)?;
        }
        attached
    }

    /// Attaches `uplink` to an uplink of the bridge, or adopts the pinned link.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Attach`].
    pub fn attach_uplink(&self, ifindex: u32, name: &str) -> Result<Attachment, DatapathError> {
        self.attach(Program::Uplink, ifindex, name)
    }

    /// Detaches `snoop` from a TAP that is gone or left the bridge, and removes its listeners,
    /// sources and limits. Does nothing for a port that is not known. Reads whole maps if it has
    /// listeners.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Pin`], [`DatapathError::Map`].
    pub fn detach_port(&self, ifindex: u32) -> Result<(), DatapathError> {
        self.detach(Program::Snoop, ifindex)?;
        self.forget_port(ifindex)
    }

    /// Detaches `uplink` likewise, and forgets its querier.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Pin`], [`DatapathError::Map`].
    pub fn detach_uplink(&self, ifindex: u32) -> Result<(), DatapathError> {
        self.detach(Program::Uplink, ifindex)?;
        self.forget_queriers(ifindex)
    }

    /// Detaches, as above, every interface that is not among these: what an earlier agent
    /// attached and is no longer a port. To be called when the ports of the bridge are known.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Pin`], [`DatapathError::Map`].
    pub fn retain(&self, ports: &[u32], uplinks: &[u32]) -> Result<(), DatapathError> {
        for (_, program, ifindex) in self.inner.pins.links()? {
            if program == Program::Snoop.name() && !ports.contains(&ifindex) {
                self.detach(Program::Snoop, ifindex)?;
            } else if program == Program::Uplink.name() && !uplinks.contains(&ifindex) {
                self.detach_uplink(ifindex)?;
            }
        }
        self.forget_ports_except(ports)
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
        let adopted = match self.inner.hook {
            Hook::Tcx => self.attach_tcx(program, ifindex, name)?,
            Hook::Clsact => self.attach_clsact(program, ifindex, name)?,
        };
        let attachment = Attachment {
            program,
            ifindex,
            interface: name.to_owned(),
            adopted,
        };
        lock(&self.inner.attached).insert((program, ifindex), attachment.clone());
        Ok(attachment)
    }

    fn attach_tcx(
        &self,
        program: Program,
        ifindex: u32,
        name: &str,
    ) -> Result<bool, DatapathError> {
        let path = self.inner.pins.link(program.name(), ifindex);
        let failed = |reason: String| attach_error(program, ifindex, name, reason);
        let mut programs = lock(&self.inner.programs);
        let classifier = classifier(&mut programs, program)?;
        if path.exists() {
            let adopted = PinnedLink::from_pin(&path)
                .and_then(|pinned| SchedClassifierLink::try_from(FdLink::from(pinned)))
                .map_err(|error| chain(&error))
                .and_then(|link| {
                    classifier
                        .attach_to_link(link)
                        .and_then(|id| classifier.take_link(id))
                        .map_err(|error| chain(&error))
                });
            match adopted {
                // The pin keeps the link; this descriptor is not needed.
                Ok(_link) => return Ok(true),
                // The interface it belonged to is gone and its index in use again.
                Err(error) => {
                    tracing::info!(
                        ifindex,
                        error,
                        "pinned link cannot be adopted, attaching anew"
                    );
                    pins::remove(&path)?;
                }
            }
        }
        same_interface(ifindex, name).map_err(failed)?;
        let link = classifier
            .attach_with_options(
                name,
                TcAttachType::Ingress,
                TcAttachOptions::TcxOrder(LinkOrder::first()),
            )
            .and_then(|id| classifier.take_link(id))
            .map_err(|error| failed(chain(&error)))?;
        // aya finds the interface by name: the name must have meant the same one all along.
        same_interface(ifindex, name).map_err(failed)?;
        FdLink::try_from(link)
            .map_err(|error| failed(chain(&error)))?
            .pin(&path)
            .map_err(|error| failed(chain(&error)))?;
        Ok(false)
    }

    fn attach_clsact(
        &self,
        program: Program,
        ifindex: u32,
        name: &str,
    ) -> Result<bool, DatapathError> {
        let failed = |reason: String| attach_error(program, ifindex, name, reason);
        same_interface(ifindex, name).map_err(failed)?;
        let mut programs = lock(&self.inner.programs);
        let classifier = classifier(&mut programs, program)?;
        // Fails when the qdisc is there already, which is as good; if it is not, attaching fails.
        if let Err(error) = qdisc_add_clsact(name) {
            tracing::debug!(name, %error, "clsact not added");
        }
        let replaced = detach_clsact(program, name).map_err(|error| failed(chain(&error)))?;
        let link = classifier
            .attach_with_options(
                name,
                TcAttachType::Ingress,
                TcAttachOptions::Netlink(NlOptions::default()),
            )
            .and_then(|id| classifier.take_link(id))
            .map_err(|error| failed(chain(&error)))?;
        // Dropping the link would remove the filter, which is to outlive the agent.
        std::mem::forget(link);
        Ok(replaced)
    }

    fn detach(&self, program: Program, ifindex: u32) -> Result<(), DatapathError> {
        let attached = lock(&self.inner.attached).remove(&(program, ifindex));
        if self.inner.hook == Hook::Clsact
            && let Some(attachment) = attached
            && let Err(error) = detach_clsact(program, &attachment.interface)
        {
            tracing::debug!(ifindex, %error, "filter was gone already");
        }
        pins::remove(&self.inner.pins.link(program.name(), ifindex))
    }
}

/// Removes the filters of a program; `false` if there were none.
fn detach_clsact(program: Program, name: &str) -> Result<bool, TcError> {
    match qdisc_detach_program(name, TcAttachType::Ingress, program.name()) {
        Ok(()) => Ok(true),
        Err(TcError::IoError(error)) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn same_interface(ifindex: u32, name: &str) -> Result<(), String> {
    match nix::net::if_::if_nametoindex(name) {
        Ok(index) if index == ifindex => Ok(()),
        Ok(_) => Err("its name belongs to another interface now".to_owned()),
        Err(_) => Err("it is gone".to_owned()),
    }
}

fn attach_error(program: Program, ifindex: u32, name: &str, reason: String) -> DatapathError {
    DatapathError::Attach {
        program: program.name(),
        interface: name.to_owned(),
        ifindex,
        reason,
    }
}

/// An error with its causes, which aya keeps apart.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
