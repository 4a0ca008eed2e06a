//! How a program gets to its hook, stays there without an agent, and is exchanged.
//!
//! With TCX and XDP the link is pinned, so it outlives the agent, and the next agent exchanges the
//! program in it without a gap. Below kernel 6.6 there is only the `clsact` qdisc: its filter
//! outlives the agent too, but cannot be pinned, and the next agent replaces it with a gap of a
//! few microseconds.

use std::io;
use std::path::Path;

use aya::Ebpf;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, qdisc_add_clsact,
    qdisc_detach_program,
};
use aya::programs::xdp::XdpLink;
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType, Xdp, XdpMode};

use super::attach::{Hook, Program};
use super::{Datapath, DatapathError, lock, pins};

/// The kernel program that restores relayed packets at XDP.
const UPLINK_XDP: &str = "uplink_xdp";

/// What a program is attached to.
#[derive(Clone, Copy)]
pub(super) struct Interface<'a> {
    pub(super) index: u32,
    pub(super) name: &'a str,
}

impl Datapath {
    /// Attaches a program to TC, or adopts the pinned link; returns whether it adopted one.
    pub(super) fn attach_tc(
        &self,
        program: Program,
        interface: Interface<'_>,
    ) -> Result<bool, DatapathError> {
        match self.inner.hook {
            Hook::Clsact => self.attach_clsact(program, interface),
            _ => self.attach_tcx(program, interface),
        }
    }

    fn attach_tcx(
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
                program.direction(),
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

    fn attach_clsact(
        &self,
        program: Program,
        interface: Interface<'_>,
    ) -> Result<bool, DatapathError> {
        let failed = |reason: String| attach_error(program, interface, reason);
        same_interface(interface).map_err(failed)?;
        let mut programs = lock(&self.inner.programs);
        let classifier = classifier(&mut programs, program)?;
        // Fails when the qdisc is there already, which is as good; if it is not, attaching fails.
        if let Err(error) = qdisc_add_clsact(interface.name) {
            tracing::debug!(interface = interface.name, %error, "clsact not added");
        }
        let replaced =
            detach_clsact(program, interface.name).map_err(|error| failed(chain(&error)))?;
        let link = classifier
            .attach_with_options(
                interface.name,
                program.direction(),
                TcAttachOptions::Netlink(NlOptions::default()),
            )
            .and_then(|id| classifier.take_link(id))
            .map_err(|error| failed(chain(&error)))?;
        // Dropping the link would remove the filter, which is to outlive the agent.
        std::mem::forget(link);
        Ok(replaced)
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
        let xdp: &mut Xdp = programs
            .program_mut(UPLINK_XDP)
            .and_then(|program| program.try_into().ok())
            .ok_or(DatapathError::Layout { name: UPLINK_XDP })?;
        // Not before it is needed: its helpers are of kernel 5.18.
        match xdp.load() {
            Ok(()) | Err(ProgramError::AlreadyLoaded) => {}
            Err(error) => return Err(failed(chain(&error))),
        }
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

    /// Whether an earlier agent has attached `uplink` to this hook.
    pub(super) fn uplink_is_pinned(&self, hook: Hook, ifindex: u32) -> bool {
        self.uplink_pin(hook, ifindex).exists()
    }

    /// Detaches `uplink` from all hooks but one.
    pub(super) fn detach_uplink_except(
        &self,
        hook: Option<Hook>,
        interface: Interface<'_>,
    ) -> Result<(), DatapathError> {
        for other in [Hook::Tcx, Hook::XdpNative, Hook::XdpGeneric] {
            if Some(other) != hook {
                pins::remove(&self.uplink_pin(other, interface.index))?;
            }
        }
        if hook != Some(Hook::Clsact) && self.inner.hook == Hook::Clsact {
            forget_clsact(Program::Uplink, interface);
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
            Hook::Tcx | Hook::Clsact => Program::Uplink.name(),
            Hook::XdpNative | Hook::XdpGeneric => xdp_pin(hook),
        };
        self.inner.pins.link(name, ifindex)
    }

    /// Detaches a program from TC.
    pub(super) fn detach_tc(
        &self,
        program: Program,
        interface: Interface<'_>,
    ) -> Result<(), DatapathError> {
        if self.inner.hook == Hook::Clsact {
            forget_clsact(program, interface);
        }
        pins::remove(&self.inner.pins.link(program.name(), interface.index))
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

/// Removes the filters of a program; `false` if there were none.
fn detach_clsact(program: Program, name: &str) -> Result<bool, TcError> {
    match qdisc_detach_program(name, program.direction(), program.name()) {
        Ok(()) => Ok(true),
        Err(TcError::IoError(error)) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn forget_clsact(program: Program, interface: Interface<'_>) {
    if let Err(error) = detach_clsact(program, interface.name) {
        tracing::debug!(interface = interface.name, %error, "filter was gone already");
    }
}

fn same_interface(interface: Interface<'_>) -> Result<(), String> {
    match nix::net::if_::if_nametoindex(interface.name) {
        Ok(index) if index == interface.index => Ok(()),
        Ok(_) => Err("its name belongs to another interface now".to_owned()),
        Err(_) => Err("it is gone".to_owned()),
    }
}

fn attach_error(program: Program, interface: Interface<'_>, reason: String) -> DatapathError {
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

impl Program {
    fn direction(self) -> TcAttachType {
        match self {
            Self::Gate | Self::Leak => TcAttachType::Egress,
            Self::Snoop | Self::Uplink | Self::Replicate => TcAttachType::Ingress,
        }
    }
}
