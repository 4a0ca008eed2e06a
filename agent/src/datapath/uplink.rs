//! Choice of the hook for `uplink`: XDP or TC.

use linux::bpf::link::Interface;

use super::attach::Attached;
use super::filter::Make;
use super::hook::{Hook, Program, UplinkHook};
use super::{Datapath, DatapathError, driver};

impl Datapath {
    /// Attaches `uplink` to the suitable hook, and afterwards detaches it from all other hooks. A
    /// packet that passes both hooks in between is restored once, because `uplink` ignores restored
    /// packets.
    pub(super) fn attach_uplink_program(
        &self,
        interface: Interface<'_>,
        make: Make,
    ) -> Result<Option<Attached>, DatapathError> {
        if let Some(hook) = self.xdp_hook(interface) {
            // An interface has a single XDP mode at a time.
            self.detach_other_xdp(hook, interface)?;
            match self.attach_xdp(hook, interface) {
                Ok(adopted) => {
                    self.detach_uplink_except(Some(hook), interface.index)?;
                    return Ok(Some((hook, None, adopted)));
                }
                Err(error) => tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    hook = hook.as_str(),
                    before = self.foreign_xdp(interface.index),
                    "Hook refused, using TC"
                ),
            }
        }
        let attached = self.attach_tc(Program::Uplink, interface, make)?;
        self.detach_uplink_except(Some(self.inner.hook), interface.index)?;
        Ok(attached)
    }

    /// Detaches `uplink` from all hooks except one.
    pub(super) fn detach_uplink_except(
        &self,
        hook: Option<Hook>,
        ifindex: u32,
    ) -> Result<(), DatapathError> {
        self.unlink_uplink_except(hook, ifindex)?;
        if hook != Some(Hook::Filter) {
            self.remove_filter(Program::Uplink, ifindex);
        }
        Ok(())
    }

    /// XDP hook to try first; `None` selects TC.
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
}
