//! Pinned links of the programs. A pinned link outlives the agent, and the next agent replaces the
//! program in the link without a gap. Without TCX, TC programs are attached by filters (`filter`)
//! instead.

use std::path::PathBuf;

use aya::Ebpf;
use aya::programs::{ProgramError, SchedClassifier, TcAttachType, Xdp, XdpMode};
use linux::bpf::link::{self, AttachError, Interface, Refused, Tcx, XdpHook};
use linux::bpf::pins::remove_link;

use super::hook::{Attachment, Hook, Program};
use super::{Datapath, DatapathError, lock};
use crate::net::tc::Side;

/// Name of the XDP program that restores relayed packets.
const UPLINK_XDP: &str = "uplink_xdp";

impl Datapath {
    /// Attaches a program to TCX, or adopts the pinned link; returns true if it adopted one.
    pub(super) fn attach_tcx(
        &self,
        program: Program,
        interface: Interface<'_>,
    ) -> Result<bool, DatapathError> {
        let pin = self.inner.pins.link(program.name(), interface.index);
        let mut programs = lock(&self.inner.programs);
        let mut tcx = tcx(&mut programs, program)?;
        link::attach(&mut tcx, interface, &pin)
            .map_err(|error| not_attached(program, interface, error))
    }

    /// Attaches `uplink` to XDP, or adopts the pinned link; returns true if it adopted one.
    ///
    /// # Errors
    ///
    /// [`DatapathError::Attach`], for instance because the driver has no XDP, another XDP program
    /// is attached, or the kernel lacks the helpers. Earlier attachments stay.
    pub(super) fn attach_xdp(
        &self,
        hook: Hook,
        interface: Interface<'_>,
    ) -> Result<bool, DatapathError> {
        let pin = self.inner.pins.link(xdp_pin(hook), interface.index);
        let failed = |error| not_attached(Program::Uplink, interface, error);
        let mut programs = lock(&self.inner.programs);
        let program = uplink_xdp(&mut programs)?.map_err(|error| failed(error.into()))?;
        let mut xdp = XdpHook {
            program,
            mode: mode(hook),
        };
        link::attach(&mut xdp, interface, &pin).map_err(failed)
    }

    /// Atomically replaces the program in the pinned link of an attachment. On failure the link
    /// keeps its program.
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
        let failed = |error: Refused| not_attached(program, interface, error.into());
        let mut programs = lock(&self.inner.programs);
        match attachment.hook {
            Hook::XdpNative | Hook::XdpGeneric => {
                let pin = self.uplink_pin(attachment.hook, attachment.ifindex);
                let program = uplink_xdp(&mut programs)?.map_err(failed)?;
                let mut xdp = XdpHook {
                    program,
                    mode: mode(attachment.hook),
                };
                link::exchange(&mut xdp, &pin).map_err(failed)
            }
            Hook::Tcx | Hook::Filter => {
                let pin = self.inner.pins.link(program.name(), attachment.ifindex);
                let mut tcx = tcx(&mut programs, program)?;
                link::exchange(&mut tcx, &pin).map_err(failed)
            }
        }
    }

    /// Whether an earlier agent pinned a link of `uplink` for this hook.
    pub(super) fn uplink_is_pinned(&self, hook: Hook, ifindex: u32) -> bool {
        self.uplink_pin(hook, ifindex).exists()
    }

    /// Removes the links of `uplink` to all hooks except one.
    pub(super) fn unlink_uplink_except(
        &self,
        hook: Option<Hook>,
        ifindex: u32,
    ) -> Result<(), DatapathError> {
        for other in [Hook::Tcx, Hook::XdpNative, Hook::XdpGeneric] {
            if Some(other) != hook {
                remove_link(&self.uplink_pin(other, ifindex))?;
            }
        }
        Ok(())
    }

    /// Detaches `uplink` from the other of the two XDP hooks.
    pub(super) fn detach_other_xdp(
        &self,
        hook: Hook,
        interface: Interface<'_>,
    ) -> Result<(), DatapathError> {
        for other in [Hook::XdpNative, Hook::XdpGeneric] {
            if other != hook {
                remove_link(&self.uplink_pin(other, interface.index))?;
            }
        }
        Ok(())
    }

    fn uplink_pin(&self, hook: Hook, ifindex: u32) -> PathBuf {
        let name = match hook {
            Hook::Tcx | Hook::Filter => Program::Uplink.name(),
            Hook::XdpNative | Hook::XdpGeneric => xdp_pin(hook),
        };
        self.inner.pins.link(name, ifindex)
    }

    /// Identifier of the XDP program `uplink_xdp`; `None` if it is not loaded.
    pub(super) fn own_xdp(&self) -> Option<u32> {
        let programs = lock(&self.inner.programs);
        let info = programs.program(UPLINK_XDP)?.info().ok()?;
        Some(info.id())
    }
}

/// Returns the program of a pinned link, from the name of the pin.
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

/// The name of the pin records the XDP mode, which the kernel does not report for a link.
fn xdp_pin(hook: Hook) -> &'static str {
    match hook {
        Hook::XdpGeneric => "uplink_generic",
        _ => "uplink_native",
    }
}

fn mode(hook: Hook) -> XdpMode {
    match hook {
        Hook::XdpGeneric => XdpMode::Skb,
        _ => XdpMode::Driver,
    }
}

fn tcx(ebpf: &mut Ebpf, program: Program) -> Result<Tcx<'_>, DatapathError> {
    Ok(Tcx {
        program: classifier(ebpf, program)?,
        side: attach_type(program),
    })
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

/// Returns `uplink_xdp`, and loads it at the first use: its helpers need kernel 5.18. The inner
/// error is the kernel's refusal.
fn uplink_xdp(ebpf: &mut Ebpf) -> Result<Result<&mut Xdp, Refused>, DatapathError> {
    let xdp: &mut Xdp = ebpf
        .program_mut(UPLINK_XDP)
        .and_then(|program| program.try_into().ok())
        .ok_or(DatapathError::Layout { name: UPLINK_XDP })?;
    Ok(match xdp.load() {
        Ok(()) | Err(ProgramError::AlreadyLoaded) => Ok(xdp),
        Err(error) => Err(Refused::by(error)),
    })
}

fn not_attached(program: Program, interface: Interface<'_>, error: AttachError) -> DatapathError {
    match error {
        AttachError::Pin(error) => error.into(),
        AttachError::Refused(refused) => attach_error(program, interface, refused.to_string()),
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

/// Direction of a program, as aya's type.
fn attach_type(program: Program) -> TcAttachType {
    match program.side() {
        Side::Ingress => TcAttachType::Ingress,
        Side::Egress => TcAttachType::Egress,
    }
}
