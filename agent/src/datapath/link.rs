//! Links: how a program gets to TCX or XDP, stays there without an agent, and is exchanged.
//!
//! The link is pinned, so it outlives the agent, and the next agent exchanges the program in it
//! without a gap. Where there is no TCX, programs of TC are attached by filters (`filter`).

use std::path::Path;

use aya::Ebpf;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::xdp::XdpLink;
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType, Xdp, XdpMode};

use super::hook::{Attachment, Hook, Program};
use super::{Datapath, DatapathError, lock, pins};
use crate::net::tc::Side;

/// The kernel program that restores relayed packets at XDP.
const UPLINK_XDP: &str = "uplink_xdp";

/// What a program is attached to.
#[derive(Clone, Copy)]
pub(super) struct Interface<'a> {
    pub(super) index: u32,
    pub(super) name: &'a str,
}

impl Datapath {
    /// Attaches a program to TCX, or adopts the pinned link; returns whether it adopted one.
    pub(super) fn attach_tcx(
        &self,
        program: Program,
        interface: Interface<'_>,
    ) -> Result<bool, DatapathError> {
        let path = self.inner.pins.link(program.name(), interface.index);
        let failed = |reason: String| attach_error(program, interface, reason);
        let mut programs = lock(&self.inner.programs);
        let classifier = classifier(&mut programs, program)?;
        let adopted = adopt(&path, interface, |link| {
            let id = classifier.attach_to_link(SchedClassifierLink::try_from(link)?)?;
            Ok(classifier.take_link(id)?)
        })?;
        if adopted {
            return Ok(true);
        }
        same_interface(interface).map_err(failed)?;
        let link = classifier
            .attach_with_options(
                interface.name,
                attach_type(program),
                TcAttachOptions::TcxOrder(LinkOrder::first()),
            )
            .and_then(|id| classifier.take_link(id))
            .map_err(|error| failed(chain(&error)))?;
        // aya finds the interface by name: the name must have meant the same one all along.
        same_interface(interface).map_err(failed)?;
        FdLink::try_from(link)
            .map_err(|error| failed(chain(&error)))?
            .pin(&path)
            .map_err(|error| failed(chain(&error)))?;
        Ok(false)
    }

    /// Attaches `uplink` to XDP, or adopts the pinned link; returns whether it adopted one.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Attach`], for instance because the driver has no XDP, another XDP program
    /// is there, or the kernel has none of the helpers; whatever was attached before is still.
    pub(super) fn attach_xdp(
        &self,
        hook: Hook,
        interface: Interface<'_>,
    ) -> Result<bool, DatapathError> {
        let path = self.inner.pins.link(xdp_pin(hook), interface.index);
        let failed = |reason: String| attach_error(Program::Uplink, interface, reason);
        let mode = match hook {
            Hook::XdpGeneric => XdpMode::Skb,
            _ => XdpMode::Driver,
        };
        let mut programs = lock(&self.inner.programs);
        let xdp = uplink_xdp(&mut programs)?.map_err(|error| failed(chain(&error)))?;
        let adopted = adopt(&path, interface, |link| {
            let id = xdp.attach_to_link(XdpLink::try_from(link)?)?;
            Ok(xdp.take_link(id)?)
        })?;
        if adopted {
            return Ok(true);
        }
        same_interface(interface).map_err(failed)?;
        let link = xdp
            .attach_to_if_index(interface.index, mode)
            .and_then(|id| xdp.take_link(id))
            .map_err(|error| failed(chain(&error)))?;
        FdLink::try_from(link)
            .map_err(|error| failed(chain(&error)))?
            .pin(&path)
            .map_err(|error| failed(chain(&error)))?;
        Ok(false)
    }

    /// Exchanges the program in the pinned link of an attachment, at once for every packet. The
    /// link keeps the program that it has if this fails.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Attach`].
    pub(super) fn exchange_in_link(&self, attachment: &Attachment) -> Result<(), DatapathError> {
        let interface = Interface {
            index: attachment.ifindex,
            name: &attachment.interface,
        };
        let program = attachment.program;
        let failed = |Exchange(reason)| attach_error(program, interface, reason);
        let mut programs = lock(&self.inner.programs);
        let path = match attachment.hook {
            Hook::XdpNative | Hook::XdpGeneric => {
                self.uplink_pin(attachment.hook, attachment.ifindex)
            }
            Hook::Tcx | Hook::Filter => self.inner.pins.link(program.name(), attachment.ifindex),
        };
        let pinned = PinnedLink::from_pin(&path).map_err(|error| failed(error.into()))?;
        let link = FdLink::from(pinned);
        // The pin keeps the link; the descriptor that is dropped here is not needed.
        match attachment.hook {
            Hook::XdpNative | Hook::XdpGeneric => {
                let xdp = uplink_xdp(&mut programs)?.map_err(|error| failed(error.into()))?;
                let exchanged = XdpLink::try_from(link)
                    .map_err(Exchange::from)
                    .and_then(|link| Ok(xdp.attach_to_link(link)?))
                    .and_then(|id| Ok(xdp.take_link(id)?));
                exchanged.map(drop).map_err(failed)
            }
            Hook::Tcx | Hook::Filter => {
                let classifier = classifier(&mut programs, program)?;
                let exchanged = SchedClassifierLink::try_from(link)
                    .map_err(Exchange::from)
                    .and_then(|link| Ok(classifier.attach_to_link(link)?))
                    .and_then(|id| Ok(classifier.take_link(id)?));
                exchanged.map(drop).map_err(failed)
            }
        }
    }

    /// Whether an earlier agent has attached `uplink` to this hook.
    pub(super) fn uplink_is_pinned(&self, hook: Hook, ifindex: u32) -> bool {
        self.uplink_pin(hook, ifindex).exists()
    }

    /// Removes the links of `uplink` to all hooks but one.
    pub(super) fn unlink_uplink_except(
        &self,
        hook: Option<Hook>,
        ifindex: u32,
    ) -> Result<(), DatapathError> {
        for other in [Hook::Tcx, Hook::XdpNative, Hook::XdpGeneric] {
            if Some(other) != hook {
                pins::remove(&self.uplink_pin(other, ifindex))?;
            }
        }
        Ok(())
    }

    /// Detaches `uplink` from the XDP hook that is not this one.
    pub(super) fn detach_other_xdp(
        &self,
        hook: Hook,
        interface: Interface<'_>,
    ) -> Result<(), DatapathError> {
        for other in [Hook::XdpNative, Hook::XdpGeneric] {
            if other != hook {
                pins::remove(&self.uplink_pin(other, interface.index))?;
            }
        }
        Ok(())
    }

    fn uplink_pin(&self, hook: Hook, ifindex: u32) -> std::path::PathBuf {
        let name = match hook {
            Hook::Tcx | Hook::Filter => Program::Uplink.name(),
            Hook::XdpNative | Hook::XdpGeneric => xdp_pin(hook),
        };
        self.inner.pins.link(name, ifindex)
    }

    /// Identifier of `uplink` for XDP, if it was needed.
    pub(super) fn own_xdp(&self) -> Option<u32> {
        let programs = lock(&self.inner.programs);
        let info = programs.program(UPLINK_XDP)?.info().ok()?;
        Some(info.id())
    }
}

/// The program that a pinned link belongs to, by the pin's name.
pub(super) fn program_of_pin(name: &str) -> Option<Program> {
    Program::ALL
        .into_iter()
        .find(|program| program.name() == name)
        .or_else(|| {
            [Hook::XdpNative, Hook::XdpGeneric]
                .into_iter()
                .any(|hook| xdp_pin(hook) == name)
                .then_some(Program::Uplink)
        })
}

/// The kernel does not tell the mode of a link, so the name of its pin does.
fn xdp_pin(hook: Hook) -> &'static str {
    match hook {
        Hook::XdpGeneric => "uplink_generic",
        _ => "uplink_native",
    }
}

/// Exchanges the program in a pinned link, if there is one.
fn adopt<L>(
    path: &Path,
    interface: Interface<'_>,
    exchange: impl FnOnce(FdLink) -> Result<L, Exchange>,
) -> Result<bool, DatapathError> {
    if !path.exists() {
        return Ok(false);
    }
    let adopted = PinnedLink::from_pin(path)
        .map_err(|error| chain(&error))
        .and_then(|pinned| exchange(FdLink::from(pinned)).map_err(|Exchange(reason)| reason));
    match adopted {
        // The pin keeps the link; this descriptor is not needed.
        Ok(_link) => Ok(true),
        // The interface it belonged to is gone and its index in use again.
        Err(error) => {
            tracing::info!(
                ifindex = interface.index,
                error,
                "pinned link cannot be adopted, attaching anew"
            );
            pins::remove(path)?;
            Ok(false)
        }
    }
}

/// Why a program could not be exchanged.
struct Exchange(String);

impl<E: std::error::Error> From<E> for Exchange {
    fn from(error: E) -> Self {
        Self(chain(&error))
    }
}

pub(super) fn classifier(
    ebpf: &mut Ebpf,
    program: Program,
) -> Result<&mut SchedClassifier, DatapathError> {
    let name = program.name();
    ebpf.program_mut(name)
        .and_then(|program| program.try_into().ok())
        .ok_or(DatapathError::Layout { name })
}

/// `uplink` for XDP, loaded when it is needed first: its helpers are of kernel 5.18. The inner error is
/// the kernel's refusal.
fn uplink_xdp(ebpf: &mut Ebpf) -> Result<Result<&mut Xdp, ProgramError>, DatapathError> {
    let xdp: &mut Xdp = ebpf
        .program_mut(UPLINK_XDP)
        .and_then(|program| program.try_into().ok())
        .ok_or(DatapathError::Layout { name: UPLINK_XDP })?;
    Ok(match xdp.load() {
        Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(xdp),
        Err(error) => Err(error),
    })
}

/// Whether there is such an interface.
pub(super) fn exists(ifindex: u32) -> bool {
    // nix 0.30 answers an empty name for an interface that is gone.
    nix::net::if_::if_indextoname(ifindex).is_ok_and(|name| !name.is_empty())
}

pub(super) fn same_interface(interface: Interface<'_>) -> Result<(), String> {
    match nix::net::if_::if_nametoindex(interface.name) {
        Ok(index) if index == interface.index => Ok(()),
        Ok(_) => Err("its name belongs to another interface now".to_owned()),
        Err(_) => Err("it is gone".to_owned()),
    }
}

pub(super) fn attach_error(
    program: Program,
    interface: Interface<'_>,
    reason: String,
) -> DatapathError {
    DatapathError::Attach {
        program: program.name(),
        interface: interface.name.to_owned(),
        ifindex: interface.index,
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

/// The side of a program, for aya.
fn attach_type(program: Program) -> TcAttachType {
    match program.side() {
        Side::Ingress => TcAttachType::Ingress,
        Side::Egress => TcAttachType::Egress,
    }
}
