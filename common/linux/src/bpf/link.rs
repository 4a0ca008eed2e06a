//! Links: attach a program to TCX or XDP independently of its process, and allow its replacement.
//!
//! The link is pinned, so it outlives the process. The next process replaces the program in the
//! link without a gap.

use std::path::Path;

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::xdp::XdpLink;
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType, Xdp, XdpMode};

use super::pins::{self, PinError};

/// The interface that a program is attached to.
#[derive(Clone, Copy, Debug)]
pub struct Interface<'a> {
    /// Index of the interface.
    pub index: u32,
    /// Name of the interface, checked against `index`.
    pub name: &'a str,
}

/// Why a program cannot be attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The pin of an old link cannot be removed.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// The kernel refused, or the interface no longer exists.
    #[error(transparent)]
    Refused(#[from] Refused),
}

/// Error of an attachment or replacement, as text.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(String);

impl Refused {
    /// Converts an error of aya, with all its causes.
    pub fn by(error: impl std::error::Error) -> Self {
        Self(chain(&error))
    }
}

/// A program that can create links of its type.
pub trait Attach {
    /// Creates a link on an interface.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    fn attach(&mut self, interface: Interface<'_>) -> Result<FdLink, Refused>;

    /// Replaces the program in a link.
    ///
    /// # Errors
    ///
    /// The error of the kernel.
    fn exchange(&mut self, link: FdLink) -> Result<(), Refused>;
}

/// A program for the first position of a TCX hook.
pub struct Tcx<'a> {
    /// Loaded TC program.
    pub program: &'a mut SchedClassifier,
    /// Ingress or egress.
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
        // aya finds the interface by its name, so the name must still mean the same interface.
        same_interface(interface)?;
        FdLink::try_from(link).map_err(Refused::by)
    }

    fn exchange(&mut self, link: FdLink) -> Result<(), Refused> {
        let link = SchedClassifierLink::try_from(link).map_err(Refused::by)?;
        let id = self.program.attach_to_link(link).map_err(Refused::by)?;
        // The pin keeps the link alive; this descriptor is not needed.
        self.program.take_link(id).map(drop).map_err(Refused::by)
    }
}

/// A program for an XDP hook.
pub struct XdpHook<'a> {
    /// Loaded XDP program.
    pub program: &'a mut Xdp,
    /// XDP mode of a new link: in the driver or after it. A replacement ignores the mode.
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
        // The pin keeps the link alive; this descriptor is not needed.
        self.program.take_link(id).map(drop).map_err(Refused::by)
    }
}

/// Attaches a program by a pinned link, or replaces the program in an existing pinned link. Returns
/// true if a link existed.
///
/// # Errors
///
/// [`AttachError::Pin`] or [`AttachError::Refused`].
pub fn attach(
    program: &mut impl Attach,
    interface: Interface<'_>,
    pin: &Path,
) -> Result<bool, AttachError> {
    if pin.exists() {
        match exchange(program, pin) {
            Ok(()) => return Ok(true),
            // The link belongs to a deleted interface whose index is in use again.
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

/// Atomically replaces the program in a pinned link. On failure the link keeps its program.
///
/// # Errors
///
/// The error of the kernel.
pub fn exchange(program: &mut impl Attach, pin: &Path) -> Result<(), Refused> {
    let pinned = PinnedLink::from_pin(pin).map_err(Refused::by)?;
    program.exchange(FdLink::from(pinned))
}

/// Checks that the name still belongs to the interface.
///
/// # Errors
///
/// What happened to the interface.
pub fn same_interface(interface: Interface<'_>) -> Result<(), Refused> {
    match nix::net::if_::if_nametoindex(interface.name) {
        Ok(index) if index == interface.index => Ok(()),
        Ok(_) => Err(Refused(
            "its name belongs to another interface now".to_owned(),
        )),
        Err(_) => Err(Refused("it is gone".to_owned())),
    }
}

/// Whether an interface with this index exists.
pub fn exists(ifindex: u32) -> bool {
    // nix 0.30 returns an empty name for a deleted interface.
    nix::net::if_::if_indextoname(ifindex).is_ok_and(|name| !name.is_empty())
}

/// Returns an error with its causes, which aya's own text omits.
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
