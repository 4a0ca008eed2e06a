//! Links: how a program gets to TCX or XDP, stays there without its process, and is exchanged.
//!
//! The link is pinned, so it outlives the process, and the next one exchanges the program in the link
//! without a gap.

use std::path::Path;

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::xdp::XdpLink;
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType, Xdp, XdpMode};

use super::pins::{self, PinError};

/// What a program is attached to.
#[derive(Clone, Copy, Debug)]
pub struct Interface<'a> {
    /// Interface index.
    pub index: u32,
    /// Its name.
    pub name: &'a str,
}

/// Why a program is not attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The pin of a link cannot be removed.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// The kernel refuses, or the interface is gone.
    #[error(transparent)]
    Refused(#[from] Refused),
}

/// Why a program could not be attached or exchanged.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(String);

impl Refused {
    /// Takes over an error of aya with its causes.
    pub fn by(error: impl std::error::Error) -> Self {
        Self(chain(&error))
    }
}

/// A program and how links of its kind are made.
pub trait Attach {
    /// Makes a link.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    fn attach(&mut self, interface: Interface<'_>) -> Result<FdLink, Refused>;

    /// Exchanges the program in a link.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    fn exchange(&mut self, link: FdLink) -> Result<(), Refused>;
}

/// A program for the first place of a TCX hook.
pub struct Tcx<'a> {
    /// The program.
    pub program: &'a mut SchedClassifier,
    /// Side of the interface.
    pub side: TcAttachType,
}

impl Attach for Tcx<'_> {
    fn attach(&mut self, interface: Interface<'_>) -> Result<FdLink, Refused> {
        let order = TcAttachOptions::TcxOrder(LinkOrder::first());
        let link = self
            .program
            .attach_with_options(interface.name, self.side, order)
            .and_then(|id| self.program.take_link(id))
            .map_err(Refused::by)?;
        // aya finds the interface by name: the name must have meant the same one all along.
        same_interface(interface)?;
        FdLink::try_from(link).map_err(Refused::by)
    }

    fn exchange(&mut self, link: FdLink) -> Result<(), Refused> {
        let link = SchedClassifierLink::try_from(link).map_err(Refused::by)?;
        let id = self.program.attach_to_link(link).map_err(Refused::by)?;
        // The pin keeps the link; this descriptor is not needed.
        self.program.take_link(id).map(drop).map_err(Refused::by)
    }
}

/// A program for an XDP hook.
pub struct XdpHook<'a> {
    /// The program.
    pub program: &'a mut Xdp,
    /// In the driver or after it; not looked at for an exchange.
    pub mode: XdpMode,
}

impl Attach for XdpHook<'_> {
    fn attach(&mut self, interface: Interface<'_>) -> Result<FdLink, Refused> {
        let link = self
            .program
            .attach_to_if_index(interface.index, self.mode)
            .and_then(|id| self.program.take_link(id))
            .map_err(Refused::by)?;
        FdLink::try_from(link).map_err(Refused::by)
    }

    fn exchange(&mut self, link: FdLink) -> Result<(), Refused> {
        let link = XdpLink::try_from(link).map_err(Refused::by)?;
        let id = self.program.attach_to_link(link).map_err(Refused::by)?;
        // The pin keeps the link; this descriptor is not needed.
        self.program.take_link(id).map(drop).map_err(Refused::by)
    }
}

/// Attaches a program by a link that is pinned, or exchanges the program in the link that is pinned
/// already; returns whether there was one.
///
/// # Errors
///
/// [`AttachError`].
pub fn attach(
    program: &mut impl Attach,
    interface: Interface<'_>,
    pin: &Path,
) -> Result<bool, AttachError> {
    if pin.exists() {
        match exchange(program, pin) {
            Ok(()) => return Ok(true),
            // The interface it belonged to is gone and its index in use again.
            Err(error) => {
                tracing::info!(
                    ifindex = interface.index,
                    %error,
                    "pinned link cannot be adopted, attaching anew"
                );
                pins::remove_link(pin)?;
            }
        }
    }
    same_interface(interface)?;
    let link = program.attach(interface)?;
    link.pin(pin).map_err(Refused::by)?;
    Ok(false)
}

/// Exchanges the program in the link that is pinned, at once for every packet. The link keeps the
/// program that it has if this fails.
///
/// # Errors
///
/// What the kernel says.
pub fn exchange(program: &mut impl Attach, pin: &Path) -> Result<(), Refused> {
    let pinned = PinnedLink::from_pin(pin).map_err(Refused::by)?;
    program.exchange(FdLink::from(pinned))
}

/// Sees that the name still means the interface.
///
/// # Errors
///
/// What has become of the interface.
pub fn same_interface(interface: Interface<'_>) -> Result<(), Refused> {
    match nix::net::if_::if_nametoindex(interface.name) {
        Ok(index) if index == interface.index => Ok(()),
        Ok(_) => Err(Refused(
            "its name belongs to another interface now".to_owned(),
        )),
        Err(_) => Err(Refused("it is gone".to_owned())),
    }
}

/// Whether there is such an interface.
pub fn exists(ifindex: u32) -> bool {
    // nix 0.30 answers an empty name for an interface that is gone.
    nix::net::if_::if_indextoname(ifindex).is_ok_and(|name| !name.is_empty())
}

/// An error with its causes, which aya keeps apart.
pub fn chain(error: &dyn std::error::Error) -> String {
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
